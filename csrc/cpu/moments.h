// Statistics of rows as stored: an exact two-pass mean and sum of squared deviations (M2) per tile
// while it is in the cache, merged by Chan's formula in double, tile by tile, then group by group.
#pragma once

#include "parallel.h"
#include "rows.h"

namespace densenet_efficient::cpu {

// Mean and M2 of `rows` rows of y. The second pass also sums the deviations: what they miss of zero is
// the rounding error of the mean, which is put right in both. sum holds C elements.
template <typename T>
void tile_moments(Rows<const T> y, int64_t rows, int64_t channels, Arithmetic<T>* __restrict mean,
                  Arithmetic<T>* __restrict m2, Arithmetic<T>* __restrict sum) {
  using A = Arithmetic<T>;
  std::fill_n(mean, channels, A(0));
  std::fill_n(m2, channels, A(0));
  std::fill_n(sum, channels, A(0));
  for (int64_t r = 0; r < rows; ++r) {
    const T* __restrict row = y[r];
    for (int64_t c = 0; c < channels; ++c) mean[c] += load(row[c]);
  }
  const A share = A(1) / static_cast<A>(rows);
  for (int64_t c = 0; c < channels; ++c) mean[c] *= share;
  for (int64_t r = 0; r < rows; ++r) {
    const T* __restrict row = y[r];
    for (int64_t c = 0; c < channels; ++c) {
      const A delta = load(row[c]) - mean[c];
      sum[c] += delta;
      m2[c] += delta * delta;
    }
  }
  for (int64_t c = 0; c < channels; ++c) {
    mean[c] += sum[c] * share;
    m2[c] -= sum[c] * sum[c] * share;
  }
}

// The running moments of each group, [groups][2][C] in double, and their counts.
class GroupMoments {
 public:
  static constexpr int64_t kSpare = workspace::cpu::kMomentRows;

  GroupMoments(Workspace& workspace, int64_t groups, int64_t channels)
      : groups_(groups),
        channels_(channels),
        count_(workspace.take_zeros<double>(groups)),
        moments_(workspace.take_zeros<double>(groups * 2 * channels)) {}

  // Adds a tile of `rows` rows; spare holds kSpare * C elements.
  template <typename T>
  void add(int64_t group, Rows<const T> y, int64_t rows, Arithmetic<T>* spare) {
    if (rows == 0) return;
    tile_moments(y, rows, channels_, spare, spare + channels_, spare + 2 * channels_);
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
