// The epilogue of the data gradient: what is done with dh after a product, while it is in cache.
#pragma once

#include <algorithm>

#include "../../arguments.h"
#include "../vector.h"

namespace densenet_efficient::cpu {

// dx = a * dz - p - (x - mean) * q with dz = dh * [a * x + s > 0], for a vector of columns from
// `column` on.
template <typename A>
inline Vector<A> norm_backward(Vector<A> dh, Vector<A> x, Rows<const A> norm,
                               Rows<const A> correction, int64_t column, int64_t count) {
  const auto table = [&](const Rows<const A>& rows, int64_t row) {
    return load_vector(rows[row] + column, count);
  };
  const Vector<A> scale = table(norm, kScale);
  const Vector<A> z = normalise(x, scale, table(norm, kMean), table(norm, kBeta));
  const Vector<A> dz = relu_mask_vector(dh, z);
  return correct(dz, x, scale, table(correction, kP), table(correction, kQ),
                 table(correction, kCenter));
}

// Epilogue of the data gradient, for a tile: `rows` neighbouring rows of x and dx,
// `columns` columns of them, dh [rows][width].
//   dz = dh * [a * x + s > 0];  dx := dz (kWrite) or dx += a * dz (kAdd)
//   sums[0] += dz * (x - mean), sums[1] += dz;  h, where not null: relu(a * x + s) as units
// The sums are of dz as it is stored: what the correction takes off must be the mean of what is
// there. They grow by blocks of rows, so that a long tile's sum is not rounded once for every row.
enum class Epilogue { kWrite, kAdd };

template <typename T, Epilogue epilogue>
void data_gradient_epilogue(const Arithmetic<T>* dh, int64_t width, Rows<const T> x,
                            Rows<const Arithmetic<T>> norm, int64_t column, int64_t columns,
                            int64_t rows, Rows<T> dx, Arithmetic<T>* dgamma, Arithmetic<T>* dbeta,
                            Unit<T>* h) {
  using V = Vector<Arithmetic<T>>;
  constexpr int64_t kBlock = 8;  // rows between two visits to the sums; the next are on their way
  for (int64_t first = 0; first < rows; first += kBlock) {
    const int64_t last = std::min(rows, first + kBlock);
    for_vectors<Arithmetic<T>>(columns, [&](int64_t c, int64_t count) {
      const int64_t at = column + c;
      const V scale = load_vector(norm[kScale] + at, count);
      const V mean = load_vector(norm[kMean] + at, count);
      const V beta = load_vector(norm[kBeta] + at, count);
      V sum_dz_x = {}, sum_dz = {};
      for (int64_t r = first; r < last; r += kGroup<T>) {
        V unit[kGroup<T>];
        for (int64_t i = 0; i < kGroup<T>; ++i) {
          unit[i] = V{};
          if (r + i >= last) continue;
          __builtin_prefetch(x[r + i + kBlock] + at);
          __builtin_prefetch(dx[r + i + kBlock] + at, 1);
          const V value = load_vector(x[r + i] + at, count);
          const V z = normalise(value, scale, mean, beta);
          V dz = relu_mask_vector(load_whole(dh + (r + i) * width + c), z);
          if constexpr (epilogue == Epilogue::kWrite) dz = as_stored<T>(dz);
          sum_dz_x += dz * (value - mean);
          sum_dz += dz;
          T* to = dx[r + i] + at;
          store_vector(epilogue == Epilogue::kAdd ? load_vector(to, count) + scale * dz : dz, to,
                       count);
          unit[i] = relu_vector(z);
        }
        if (h) store_units<T>(unit, h + r / kGroup<T> * width + c);
      }
      store_whole(load_whole(dgamma + c) + sum_dz_x, dgamma + c);
      store_whole(load_whole(dbeta + c) + sum_dz, dbeta + c);
    });
  }
  // Columns up to the panel's width are operands too.
  if (h && round_up(columns, kLanes<Arithmetic<T>>) < width)
    for (int64_t r = 0; r < ceil_div(rows, kGroup<T>); ++r)
      std::fill(h + r * width + round_up(columns, kLanes<Arithmetic<T>>), h + (r + 1) * width,
                Unit<T>(0));
}

}  // namespace densenet_efficient::cpu
