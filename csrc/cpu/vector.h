// Vectors of channels: the loops that touch every activation, at the full width of the processor.
//
// Written with the compiler's vector types, so they run on any processor; instructions for bfloat16
// and float16 are used where they exist. `count` is how many channels are left: a vector that is
// only partly there is loaded with zeros past its end, and stored without them.
#pragma once

#include <algorithm>

#include "../norm_relu.h"
#include "numeric.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace densenet_efficient::cpu {

template <typename A>
struct VectorOf {
  typedef A type __attribute__((vector_size(kVectorBytes)));
};
template <typename A>
using Vector = typename VectorOf<A>::type;
template <typename A>
constexpr int64_t kLanes = kVectorBytes / static_cast<int64_t>(sizeof(A));

template <typename V>
inline V read(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof(V));
  return v;
}

typedef uint16_t Bits16 __attribute__((vector_size(kVectorBytes / 2)));

// A whole vector of T as its arithmetic type.
inline Vector<double> load_whole(const double* from) { return read<Vector<double>>(from); }
inline Vector<float> load_whole(const float* from) { return read<Vector<float>>(from); }
inline Vector<float> load_whole(const BFloat16* from) {
#if defined(__AVX512F__)
  const auto wide = (Vector<uint32_t>)_mm512_maskz_cvtepu16_epi32(0xffff, read<__m256i>(from));
#else
  const auto wide = __builtin_convertvector(read<Bits16>(from), Vector<uint32_t>);
#endif
  return (Vector<float>)(wide << 16);
}
inline Vector<float> load_whole(const Half* from) {
#if defined(__AVX512F__)
  return (Vector<float>)_mm512_maskz_cvtph_ps(0xffff, read<__m256i>(from));
#else
  Vector<float> v;
  for (int64_t i = 0; i < kLanes<float>; ++i) v[i] = load(from[i]);
  return v;
#endif
}

// Round to nearest even.
inline Bits16 bfloat16_bits(Vector<float> x) {
#if defined(__AVX512BF16__)
  return (Bits16)_mm512_cvtneps_pbh((__m512)x);
#else
  const auto bits = (Vector<uint32_t>)x;
  const auto rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const auto nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return __builtin_convertvector(nan ? Vector<uint32_t>{} + 0x7fc0u : rounded, Bits16);
#endif
}

// dithered<16> (dither.h) of a vector, the same bits: index is that of its first element.
inline Vector<float> dithered_bfloat16(Vector<float> x, uint32_t index) {
  Vector<uint32_t> lane;
  for (uint32_t i = 0; i < kLanes<float>; ++i) lane[i] = i;
  const auto hash = (lane + index) * 0x9e3779b1u;
  const auto noise = ((hash ^ (hash >> 15)) * 0x85ebca77u) >> 16;
  const auto rounded = ((Vector<uint32_t>)x + noise) & 0xffff0000u;
  return x == x ? (Vector<float>)rounded : x;  // a NaN stays one
}

inline void store_whole(Vector<double> v, double* to) { std::memcpy(to, &v, sizeof(v)); }
inline void store_whole(Vector<float> v, float* to) { std::memcpy(to, &v, sizeof(v)); }
inline void store_whole(Vector<float> v, BFloat16* to) {
  const Bits16 bits = bfloat16_bits(v);
  std::memcpy(to, &bits, sizeof(bits));
}
inline void store_whole(Vector<float> v, uint16_t* to) {
  const Bits16 bits = bfloat16_bits(v);
  std::memcpy(to, &bits, sizeof(bits));
}
inline void store_whole(Vector<float> v, Half* to) {
#if defined(__AVX512F__)
  const __m256i bits = _mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(to, &bits, sizeof(bits));
#else
  for (int64_t i = 0; i < kLanes<float>; ++i) to[i] = Half(v[i]);
#endif
}

// v as it comes back once it is stored as T.
template <typename T>
inline Vector<Arithmetic<T>> as_stored(Vector<Arithmetic<T>> v) {
  if constexpr (sizeof(T) == sizeof(Arithmetic<T>)) return v;
  T stored[kLanes<Arithmetic<T>>];
  store_whole(v, stored);
  return load_whole(stored);
}

template <typename T>
inline Vector<Arithmetic<T>> load_vector(const T* from, int64_t count) {
  constexpr int64_t lanes = kLanes<Arithmetic<T>>;
  if (count >= lanes) return load_whole(from);
  T whole[lanes];
  std::memset(static_cast<void*>(whole), 0, sizeof(whole));
  std::copy_n(from, std::max<int64_t>(count, 0), whole);
  return load_whole(whole);
}

template <typename V, typename To>
inline void store_vector(V v, To* to, int64_t count) {
  constexpr int64_t lanes = kVectorBytes / static_cast<int64_t>(sizeof(v[0]));
  if (count >= lanes) return store_whole(v, to);
  To whole[lanes];
  store_whole(v, whole);
  std::copy_n(whole, std::max<int64_t>(count, 0), to);
}

// The units of a reduction over rows, from one vector of each of the rows that a unit holds.
template <typename T>
inline void store_units(const Vector<Arithmetic<T>>* rows, Unit<T>* to) {
  if constexpr (kGroup<T> == 1) {
    store_whole(rows[0], to);
  } else {
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
    const auto order = (__m512i)Vector<uint32_t>{0x00100000, 0x00110001, 0x00120002, 0x00130003,
                                                 0x00140004, 0x00150005, 0x00160006, 0x00170007,
                                                 0x00180008, 0x00190009, 0x001a000a, 0x001b000b,
                                                 0x001c000c, 0x001d000d, 0x001e000e, 0x001f000f};
    const auto both = (__m512i)_mm512_cvtne2ps_pbh((__m512)rows[1], (__m512)rows[0]);
    const __m512i units = _mm512_permutexvar_epi16(order, both);
#else
    const auto units = __builtin_convertvector(bfloat16_bits(rows[0]), Vector<uint32_t>) |
                       __builtin_convertvector(bfloat16_bits(rows[1]), Vector<uint32_t>) << 16;
#endif
    std::memcpy(to, &units, sizeof(units));
  }
}

template <typename V>
inline V relu_vector(V z) {
  return z < V{} ? V{} : z;
}

template <typename V>
inline V relu_mask_vector(V dh, V z) {
  return z <= V{} ? V{} : dh;
}

// Calls f(column, count) for the vectors of `columns` columns, count constant for whole ones.
template <typename A, typename F>
inline void for_vectors(int64_t columns, const F& f) {
  constexpr int64_t lanes = kLanes<A>;
  int64_t c = 0;
  for (; c + lanes <= columns; c += lanes) f(c, lanes);
  if (c < columns) f(c, columns - c);
}

}  // namespace densenet_efficient::cpu
