// Per-channel tables: partial sums added in a fixed order, and what they become: the gradient of a
// norm, and its correction.
#pragma once

#include <algorithm>
#include <vector>

#include "../../arguments.h"
#include "../vector.h"

namespace densenet_efficient::cpu {

template <typename A>
inline void add_to(const A* __restrict tile, int64_t count, double* __restrict total) {
  for (int64_t c = 0; c < count; ++c) total[c] += tile[c];
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

// norm [5, C] from stats [2, C]; gamma and beta [C] or null.
template <typename A>
inline void fold_norm(Rows<const A> stats, const A* gamma, const A* beta, double eps,
                      int64_t channels, Rows<A> norm) {
  for (int64_t c = 0; c < channels; ++c) {
    const auto folded = fold(stats[kStatsMean][c], stats[kStatsVar][c], gamma ? gamma[c] : A(1),
                             beta ? beta[c] : A(0), eps);
    norm[kScale][c] = folded.scale;
    norm[kShift][c] = folded.shift;
    norm[kMean][c] = folded.mean;
    norm[kRstd][c] = folded.rstd;
    norm[kBeta][c] = folded.beta;
  }
}

// The norm that follows an operator, where its caller names one.
template <typename A>
inline void fold_next(const arguments::FoldedNext& next) {
  if (next.norm)
    fold_norm<A>(input_rows<A>(next.stats), input_rows<A>(next.gamma).data,
                 input_rows<A>(next.beta).data, next.eps, next.C, output_rows<A>(next.norm));
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

// The same, or p and q of it added to the first channels of a correction.
template <typename A>
inline void put_correction(Rows<const A> dnorm, Rows<const A> norm, int64_t count, bool accumulate,
                           int64_t channels, Rows<A> correction) {
  if (!accumulate) return make_correction(dnorm, norm, count, channels, correction);
  std::vector<A> own(kCorrectionRows * channels);
  make_correction(dnorm, norm, count, channels, Rows<A>{own.data(), channels});
  for (const auto row : {kP, kQ})
    for (int64_t c = 0; c < channels; ++c) correction[row][c] += own[row * channels + c];
}

// The correction that a convolution's backward makes of its dnorm, or adds to, where its caller
// gives one.
template <typename A, typename Call>
inline void correct_x(const Call& call, bool accumulate) {
  if (call.x_correction)
    put_correction<A>(input_rows<A>(call.dnorm), input_rows<A>(call.norm), call.count, accumulate,
                      call.C, output_rows<A>(call.x_correction));
}

}  // namespace densenet_efficient::cpu
