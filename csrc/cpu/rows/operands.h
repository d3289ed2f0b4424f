// Rows of channels on their way into and out of the products: loops that several operators share.
#pragma once

#include <algorithm>

#include "../../arguments.h"
#include "../vector.h"

namespace densenet_efficient::cpu {

// Asks for a row that is read soon: the rows of a slice are too far apart for the processor to
// guess.
template <typename T>
inline void prefetch_row(const T* row, int64_t channels) {
  for (int64_t c = 0; c < channels; c += 64 / static_cast<int64_t>(sizeof(T)))
    __builtin_prefetch(row + c);
}

// One row as an operand: relu((x - mean) * a + beta), zero up to `padded` columns.
template <typename T>
inline void norm_relu_row(const T* x, Rows<const Arithmetic<T>> norm, int64_t channels,
                          int64_t padded, Element<T>* out) {
  for_vectors<Arithmetic<T>>(padded, [&](int64_t c, int64_t count) {
    const int64_t left = channels - c;
    const auto z =
        normalise(load_vector(x + c, left), load_vector(norm[kScale] + c, left),
                  load_vector(norm[kMean] + c, left), load_vector(norm[kBeta] + c, left));
    store_vector(relu_vector(z), out + c, count);
  });
}

// The same as units of a reduction over rows: x holds the row, or two, that a unit holds, or null
// for a row of zeros; the norm's columns begin at `column`. `padded` is a multiple of the vector's
// length.
template <typename T>
inline void norm_relu_units(const T* const* x, Rows<const Arithmetic<T>> norm, int64_t column,
                            int64_t channels, int64_t padded, Unit<T>* out) {
  using V = Vector<Arithmetic<T>>;
  for_vectors<Arithmetic<T>>(padded, [&](int64_t c, int64_t) {
    const int64_t left = channels - c;
    const V scale = load_vector(norm[kScale] + column + c, left);
    const V mean = load_vector(norm[kMean] + column + c, left);
    const V beta = load_vector(norm[kBeta] + column + c, left);
    V rows[kGroup<T>];
    for (int64_t i = 0; i < kGroup<T>; ++i)
      rows[i] = x[i] ? relu_vector(normalise(load_vector(x[i] + c, left), scale, mean, beta)) : V{};
    store_units<T>(rows, out + c);
  });
}

// Units of a reduction over rows: element c of `low` and of `high` side by side (high null: zero).
template <typename T>
inline void interleave(const Element<T>* __restrict low, const Element<T>* __restrict high,
                       int64_t columns, Unit<T>* __restrict out) {
  if constexpr (kGroup<T> == 1) {
    std::copy_n(low, columns, out);
  } else if (high) {
    for (int64_t c = 0; c < columns; ++c)
      out[c] = static_cast<Unit<T>>(low[c]) | static_cast<Unit<T>>(high[c]) << 16;
  } else {
    for (int64_t c = 0; c < columns; ++c) out[c] = static_cast<Unit<T>>(low[c]);
  }
}

// One row of dy = a * dz - p - (y - mean) * q as an operand; y null: dy = dz. kDither: operands
// rounded to T are dithered where a = 1, index being that of the row's first element in the tensor.
template <typename T, bool kDither = false>
inline void dy_row(const T* dz, const T* y, const Rows<const Arithmetic<T>>& correction,
                   int64_t channels, int64_t padded, Element<T>* out, uint32_t index = 0) {
  for_vectors<Arithmetic<T>>(padded, [&](int64_t c, int64_t count) {
    const int64_t left = channels - c;
    auto dy = load_vector(dz + c, left);
    if (y) {
      const auto a = load_vector(correction[kA] + c, left);
      dy = correct(dy, load_vector(y + c, left), a, load_vector(correction[kP] + c, left),
                   load_vector(correction[kQ] + c, left),
                   load_vector(correction[kCenter] + c, left));
      if constexpr (kDither && sizeof(Element<T>) == 2)
        dy = a == 1.0f ? dithered_bfloat16(dy, index + static_cast<uint32_t>(c)) : dy;
    }
    store_vector(dy, out + c, count);
  });
}

template <typename T>
inline void store_row(const Arithmetic<T>* from, int64_t channels, T* to) {
  for_vectors<Arithmetic<T>>(channels, [&](int64_t c, int64_t count) {
    store_vector(load_vector(from + c, count), to + c, count);
  });
}

}  // namespace densenet_efficient::cpu
