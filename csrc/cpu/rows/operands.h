// Rows of channels: the loops over them that several stages share.
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

// One row as an operand: relu(scale * x + shift), zero up to `padded` columns.
template <typename T>
inline void norm_relu_row(const T* x, const Arithmetic<T>* scale, const Arithmetic<T>* shift,
                          int64_t channels, int64_t padded, Element<T>* out) {
  for_vectors<Arithmetic<T>>(padded, [&](int64_t c, int64_t count) {
    const int64_t left = channels - c;
    const auto z = normalise(load_vector(x + c, left), load_vector(scale + c, left),
                             load_vector(shift + c, left));
    store_vector(relu_vector(z), out + c, count);
  });
}

// The same as units of a reduction over rows: x holds the row, or two, that a unit holds, or null
// for a row of zeros. `padded` is a multiple of the vector's length.
template <typename T>
inline void norm_relu_units(const T* const* x, const Arithmetic<T>* scale,
                            const Arithmetic<T>* shift, int64_t channels, int64_t padded,
                            Unit<T>* out) {
  using V = Vector<Arithmetic<T>>;
  for_vectors<Arithmetic<T>>(padded, [&](int64_t c, int64_t) {
    const int64_t left = channels - c;
    const V a = load_vector(scale + c, left), s = load_vector(shift + c, left);
    V rows[kGroup<T>];
    for (int64_t i = 0; i < kGroup<T>; ++i)
      rows[i] = x[i] ? relu_vector(normalise(load_vector(x[i] + c, left), a, s)) : V{};
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

// One row of dy = a * dz - p - (y - mean) * q as an operand; y null: dy = dz.
template <typename T>
inline void dy_row(const T* dz, const T* y, const Rows<const Arithmetic<T>>& correction,
                   int64_t channels, int64_t padded, Element<T>* out) {
  for_vectors<Arithmetic<T>>(padded, [&](int64_t c, int64_t count) {
    const int64_t left = channels - c;
    auto dy = load_vector(dz + c, left);
    if (y)
      dy = correct(dy, load_vector(y + c, left), load_vector(correction[kA] + c, left),
                   load_vector(correction[kP] + c, left), load_vector(correction[kQ] + c, left),
                   load_vector(correction[kCenter] + c, left));
    store_vector(dy, out + c, count);
  });
}

template <typename T>
inline void store_row(const Arithmetic<T>* from, int64_t channels, T* to) {
  for_vectors<Arithmetic<T>>(channels, [&](int64_t c, int64_t count) {
    store_vector(load_vector(from + c, count), to + c, count);
  });
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

// dx = a * dz - p - (x - mean) * q with dz = dh * [a * x + s > 0], for a vector of columns from
// `column` on.
template <typename A>
inline Vector<A> norm_backward(Vector<A> dh, Vector<A> x, Rows<const A> norm,
                               Rows<const A> correction, int64_t column, int64_t count) {
  const auto table = [&](const Rows<const A>& rows, int64_t row) {
    return load_vector(rows[row] + column, count);
  };
  const Vector<A> scale = table(norm, kScale);
  const Vector<A> dz = relu_mask_vector(dh, normalise(x, scale, table(norm, kShift)));
  return correct(dz, x, scale, table(correction, kP), table(correction, kQ),
                 table(correction, kCenter));
}

// What becomes of dh behind the product, for a tile: `rows` neighbouring rows of x and dx,
// `columns` columns of them, dh [rows][width].
//   dz = dh * [a * x + s > 0];  dx := dz (kWrite) or dx += a * dz (kAdd)
//   sums[0] += dz * (x - mean), sums[1] += dz;  h, where not null: relu(a * x + s) as units
enum class Take { kWrite, kAdd };

template <typename T, Take take>
void take_dh(const Arithmetic<T>* dh, int64_t width, Rows<const T> x,
             Rows<const Arithmetic<T>> norm, int64_t column, int64_t columns, int64_t rows,
             Rows<T> dx, Arithmetic<T>* dgamma, Arithmetic<T>* dbeta, Unit<T>* h) {
  using V = Vector<Arithmetic<T>>;
  constexpr int64_t kBlock = 8;  // rows between two visits to the sums; the next are on their way
  for (int64_t first = 0; first < rows; first += kBlock) {
    const int64_t last = std::min(rows, first + kBlock);
    for_vectors<Arithmetic<T>>(columns, [&](int64_t c, int64_t count) {
      const int64_t at = column + c;
      const V scale = load_vector(norm[kScale] + at, count);
      const V shift = load_vector(norm[kShift] + at, count);
      const V mean = load_vector(norm[kMean] + at, count);
      V sum_dz_x = load_whole(dgamma + c), sum_dz = load_whole(dbeta + c);
      for (int64_t r = first; r < last; r += kGroup<T>) {
        V unit[kGroup<T>];
        for (int64_t i = 0; i < kGroup<T>; ++i) {
          unit[i] = V{};
          if (r + i >= last) continue;
          __builtin_prefetch(x[r + i + kBlock] + at);
          __builtin_prefetch(dx[r + i + kBlock] + at, 1);
          const V value = load_vector(x[r + i] + at, count);
          const V z = normalise(value, scale, shift);
          const V dz = relu_mask_vector(load_whole(dh + (r + i) * width + c), z);
          sum_dz_x += dz * (value - mean);
          sum_dz += dz;
          T* to = dx[r + i] + at;
          store_vector(take == Take::kAdd ? load_vector(to, count) + scale * dz : dz, to, count);
          unit[i] = relu_vector(z);
        }
        if (h) store_units<T>(unit, h + r / kGroup<T> * width + c);
      }
      store_whole(sum_dz_x, dgamma + c);
      store_whole(sum_dz, dbeta + c);
    });
  }
  // Columns up to the panel's width are operands too.
  if (h && round_up(columns, kLanes<Arithmetic<T>>) < width)
    for (int64_t r = 0; r < ceil_div(rows, kGroup<T>); ++r)
      std::fill(h + r * width + round_up(columns, kLanes<Arithmetic<T>>), h + (r + 1) * width,
                Unit<T>(0));
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
