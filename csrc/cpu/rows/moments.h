// Statistics of rows as stored: an exact two-pass mean and sum of squared deviations (M2) per tile
// while it is in the cache, merged by Chan's formula in double, tile by tile, then group by group.
#pragma once

#include "../parallel.h"
#include "operands.h"

namespace densenet_efficient::cpu {

// Mean and M2 of `rows` rows of y. The second pass also sums the deviations: what they miss of zero
// is the rounding error of the mean, which is corrected in both.
template <typename T>
void tile_moments(Rows<const T> y, int64_t rows, int64_t channels, Arithmetic<T>* mean,
                  Arithmetic<T>* m2) {
  using A = Arithmetic<T>;
  using V = Vector<A>;
  constexpr int64_t kUnroll = 4;  // independent sums, to hide the latency of an addition
  const A share = A(1) / static_cast<A>(rows);
  for_vectors<A>(channels, [&](int64_t c, int64_t count) {
    V sum[kUnroll] = {}, square[kUnroll] = {};
    const auto each_row = [&](const auto& visit) {
      int64_t r = 0;
      for (; r + kUnroll <= rows; r += kUnroll)
        for (int64_t i = 0; i < kUnroll; ++i) visit(i, load_vector(y[r + i] + c, count));
      for (; r < rows; ++r) visit(0, load_vector(y[r] + c, count));
    };
    each_row([&](int64_t i, V value) { sum[i] += value; });
    const V center = ((sum[0] + sum[1]) + (sum[2] + sum[3])) * share;
    for (V& s : sum) s = V{};
    each_row([&](int64_t i, V value) {
      const V delta = value - center;
      sum[i] += delta;
      square[i] += delta * delta;
    });
    const V missed = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    const V total = (square[0] + square[1]) + (square[2] + square[3]);
    store_vector(center + missed * share, mean + c, count);
    const V squares = total - missed * missed * share;  // of a constant channel: 0, rounded
    store_vector(squares < A(0) ? V{} : squares, m2 + c, count);
  });
}

// The running moments of each group, [groups][2][C] in double, and their counts.
class GroupMoments {
 public:
  static constexpr int64_t kSpare = tiling::kMomentRows;

  GroupMoments(Workspace& workspace, int64_t groups, int64_t channels)
      : groups_(groups),
        channels_(channels),
        count_(workspace.take_zeros<double>(groups)),
        moments_(workspace.take_zeros<double>(groups * 2 * channels)) {}

  // Adds a tile of `rows` rows; spare holds kSpare * C elements.
  template <typename T>
  void add(int64_t group, Rows<const T> y, int64_t rows, Arithmetic<T>* spare) {
    if (rows == 0) return;
    tile_moments(y, rows, channels_, spare, spare + channels_);
    merge_into(group, spare, spare + channels_, static_cast<double>(rows));
  }

  // Merges the groups in order and writes stats [2, C].
  template <typename A>
  void finish(Rows<A> stats) {
    for (int64_t g = 1; g < groups_; ++g)
      merge_into(0, moments_ + 2 * g * channels_, moments_ + (2 * g + 1) * channels_, count_[g]);
    for (int64_t c = 0; c < channels_; ++c) {
      stats[kStatsMean][c] = static_cast<A>(moments_[c]);
      stats[kStatsVar][c] = static_cast<A>(moments_[channels_ + c] / std::max(count_[0], 1.0));
    }
  }

 private:
  template <typename A>
  void merge_into(int64_t group, const A* __restrict mean, const A* __restrict m2, double rows) {
    double* __restrict to_mean = moments_ + 2 * group * channels_;
    double* __restrict to_m2 = to_mean + channels_;
    const double before = count_[group];
    for (int64_t c = 0; c < channels_; ++c) {
      const auto merged = merge(Moments<double>{before, to_mean[c], to_m2[c]},
                                Moments<double>{rows, mean[c], m2[c]});
      to_mean[c] = merged.mean;
      to_m2[c] = merged.m2;
    }
    count_[group] = before + rows;
  }

  int64_t groups_, channels_;
  double* count_;
  double* moments_;
};

}  // namespace densenet_efficient::cpu
