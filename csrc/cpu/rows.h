// Rows of channels: views of tensors, and the loops over them that several stages share.
#pragma once

#include <algorithm>

#include "../checks.h"
#include "../norm_relu.h"
#include "numeric.h"

namespace densenet_efficient::cpu {

// Rows of a channels-last tensor or of a table of per-channel vectors.
template <typename T>
struct Rows {
  T* data;
  int64_t stride;
  T* operator[](int64_t row) const { return data + row * stride; }
};

template <typename T>
Rows<const T> input_rows(const Tensor& tensor, int64_t stride) {
  return {static_cast<const T*>(tensor.const_data_ptr()), stride};
}

template <typename T>
Rows<T> output_rows(const Tensor& tensor, int64_t stride) {
  return {static_cast<T*>(tensor.mutable_data_ptr()), stride};
}

// One row as an operand: relu(scale * x + shift), zero up to `padded` columns.
template <typename T>
inline void norm_relu_row(const T* __restrict x, const Arithmetic<T>* __restrict scale,
                          const Arithmetic<T>* __restrict shift, int64_t channels, int64_t padded,
                          Element<T>* __restrict out) {
  for (int64_t c = 0; c < channels; ++c)
    out[c] = element<T>(norm_relu(load(x[c]), scale[c], shift[c]));
  for (int64_t c = channels; c < padded; ++c) out[c] = Element<T>(0);
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

// One row of dy = a * dz - p - (y - mean) * q as an operand.
template <typename T>
inline void corrected_row(const T* __restrict dz, const T* __restrict y,
                          const Rows<const Arithmetic<T>>& correction, int64_t channels,
                          int64_t padded, Element<T>* __restrict out) {
  const Arithmetic<T>* __restrict a = correction[kA];
  const Arithmetic<T>* __restrict p = correction[kP];
  const Arithmetic<T>* __restrict q = correction[kQ];
  const Arithmetic<T>* __restrict mean = correction[kCenter];
  for (int64_t c = 0; c < channels; ++c)
    out[c] = element<T>(correct(load(dz[c]), load(y[c]), a[c], p[c], q[c], mean[c]));
  for (int64_t c = channels; c < padded; ++c) out[c] = Element<T>(0);
}

template <typename T>
inline void element_row(const T* __restrict from, int64_t channels, int64_t padded,
                        Element<T>* __restrict out) {
  for (int64_t c = 0; c < channels; ++c) out[c] = element<T>(load(from[c]));
  for (int64_t c = channels; c < padded; ++c) out[c] = Element<T>(0);
}

template <typename T>
inline void store_row(const Arithmetic<T>* __restrict from, int64_t channels, T* __restrict to) {
  for (int64_t c = 0; c < channels; ++c) to[c] = store<T>(from[c]);
}

// Adds partial[0], partial[1], ... (each `count` elements, `pitch` apart), in this order.
template <typename A>
inline void sum_partials(const A* partials, int64_t groups, int64_t pitch, int64_t count,
                         A* __restrict out) {
  std::copy_n(partials, count, out);
  for (int64_t g = 1; g < groups; ++g) {
    const A* __restrict partial = partials + g * pitch;
    for (int64_t i = 0; i < count; ++i) out[i] += partial[i];
  }
}

// dnorm from the groups' sums [groups][2][C] of dz * (x - mean) and dz, in this order.
template <typename A>
inline void finish_dnorm(const double* sums, int64_t groups, int64_t channels, const A* rstd,
                         Rows<A> dnorm) {
  for (int64_t c = 0; c < channels; ++c) {
    double dgamma = 0, dbeta = 0;
    for (int64_t g = 0; g < groups; ++g) {
      dgamma += sums[2 * g * channels + c];
      dbeta += sums[(2 * g + 1) * channels + c];
    }
    dnorm[kDgamma][c] = static_cast<A>(dgamma * rstd[c]);
    dnorm[kDbeta][c] = static_cast<A>(dbeta);
  }
}

// The correction [4, C] of a norm from its dnorm, statistics over `count` rows (0: p = q = 0).
template <typename A>
inline void make_correction(Rows<const A> dnorm, Rows<const A> norm, int64_t count,
                            int64_t channels, Rows<A> correction) {
  const double share = count > 0 ? 1.0 / static_cast<double>(count) : 0.0;
  for (int64_t c = 0; c < channels; ++c) {
    const double scale = norm[kScale][c] * share;
    correction[kA][c] = norm[kScale][c];
    correction[kP][c] = count > 0 ? static_cast<A>(scale * dnorm[kDbeta][c]) : A(0);
    correction[kQ][c] =
        count > 0 ? static_cast<A>(scale * norm[kRstd][c] * dnorm[kDgamma][c]) : A(0);
    correction[kCenter][c] = norm[kMean][c];
  }
}

// dx = a * dz - p - (x - mean) * q with dz = dh * [a * x + s > 0], for part of a row.
template <typename T>
inline void norm_backward_row(const Arithmetic<T>* __restrict dh, const T* __restrict x,
                              Rows<const Arithmetic<T>> norm,
                              Rows<const Arithmetic<T>> correction, int64_t column,
                              int64_t columns, T* __restrict dx) {
  using A = Arithmetic<T>;
  const A* __restrict scale = norm[kScale] + column;
  const A* __restrict shift = norm[kShift] + column;
  const A* __restrict p = correction[kP] + column;
  const A* __restrict q = correction[kQ] + column;
  const A* __restrict mean = correction[kCenter] + column;
  for (int64_t c = 0; c < columns; ++c) {
    const A value = load(x[c]);
    const A dz = relu_mask(dh[c], normalise(value, scale[c], shift[c]));
    dx[c] = store<T>(correct(dz, value, scale[c], p[c], q[c], mean[c]));
  }
}

template <typename A>
inline void add_to(const A* __restrict tile, int64_t count, double* __restrict total) {
  for (int64_t c = 0; c < count; ++c) total[c] += tile[c];
}

template <typename A>
inline void fill_table(Rows<A> table, int64_t rows, int64_t channels, A value) {
  for (int64_t r = 0; r < rows; ++r) std::fill_n(table[r], channels, value);
}

}  // namespace densenet_efficient::cpu
