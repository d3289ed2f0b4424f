// Numbers on the CPU: how a storage type T becomes an arithmetic type, and what the products read.
//
//   T             Arithmetic   Element (row-major operand)   Unit (what one multiply-add takes)
//   double        double       double                        double
//   float         float        float                         float
//   Half          float        float                         float
//   BFloat16      float        uint16_t (its bits)           uint32_t, two of the reduction
//
// The last line holds where the processor multiplies bfloat16 pairs itself (AVX512_BF16); elsewhere
// bfloat16 becomes float in front of a product, as Half always does.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../integers.h"
#include "../stable.h"

namespace densenet_efficient::cpu {

#if defined(__AVX512F__)
constexpr int64_t kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int64_t kVectorBytes = 32;
#else
constexpr int64_t kVectorBytes = 16;
#endif

template <typename T>
struct Numeric {
  using Arithmetic = float;
  using Element = float;
  using Unit = float;
};

template <>
struct Numeric<double> {
  using Arithmetic = double;
  using Element = double;
  using Unit = double;
};

#if defined(__AVX512BF16__)
template <>
struct Numeric<BFloat16> {
  using Arithmetic = float;
  using Element = uint16_t;
  using Unit = uint32_t;
};
#endif

template <typename T>
using Arithmetic = typename Numeric<T>::Arithmetic;
template <typename T>
using Element = typename Numeric<T>::Element;
template <typename T>
using Unit = typename Numeric<T>::Unit;

// Elements that one unit holds: the reduction dimension is padded to a multiple of it.
template <typename T>
constexpr int64_t kGroup = sizeof(Unit<T>) / sizeof(Element<T>);

template <typename To, typename From>
inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

inline double load(double x) { return x; }
inline float load(float x) { return x; }
inline float load(BFloat16 x) { return bits_as<float>(static_cast<uint32_t>(x.x) << 16); }
inline float load(Half x) { return static_cast<float>(x); }

// Round to nearest even without a branch, so that loops over channels vectorise.
inline uint16_t bfloat16_bits(float x) {
  const uint32_t bits = bits_as<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

template <typename T>
inline T store(Arithmetic<T> x) {
  if constexpr (std::is_same_v<T, BFloat16>)
    return BFloat16(bfloat16_bits(x), BFloat16::from_bits());
  else
    return static_cast<T>(x);
}

// A value as an operand of a product, rounded as T is stored where products read T itself.
template <typename T>
inline Element<T> element(Arithmetic<T> x) {
  if constexpr (std::is_same_v<Element<T>, uint16_t>)
    return bfloat16_bits(x);
  else
    return x;
}

}  // namespace densenet_efficient::cpu
