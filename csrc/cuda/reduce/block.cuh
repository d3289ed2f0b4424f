// The first pass of a reduction over rows: what a thread holds of its channels (sums, or exact
// moments), merged over the threads of a block in a fixed order, and written as the block's partial
// result (tiling/partials.h). The second pass is in finish.cuh.
#pragma once

#include "../launch.h"
#include "../tiling/columns.h"
#include "../vector.cuh"

namespace densenet_efficient {

using tiling::Columns, tiling::ColumnThread, tiling::kColumnThreads;

// Two numbers for each of V channels: mean and M2 of `count` rows, or two sums.
template <typename A, int V>
struct Pairs {
  A count, first[V], second[V];

  __device__ __forceinline__ static Pairs zero() {
    Pairs pairs;
    pairs.count = A(0);
#pragma unroll
    for (int v = 0; v < V; ++v) pairs.first[v] = pairs.second[v] = A(0);
    return pairs;
  }
};

// Chan's formula (norm_relu.h), with the same counts for all channels.
struct MergeMoments {
  static constexpr int kRows = tiling::kMomentRows;
  static constexpr bool kCounts = true;

  template <typename A, int V>
  __device__ __forceinline__ static void merge(Pairs<A, V>& left, const Pairs<A, V>& right) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const Moments<A> both =
          densenet_efficient::merge(Moments<A>{left.count, left.first[v], left.second[v]},
                                    Moments<A>{right.count, right.first[v], right.second[v]});
      left.first[v] = both.mean;
      left.second[v] = both.m2;
    }
    left.count += right.count;
  }
};

// The moments of the first `count` of R rows, by exact two-pass; the other rows must hold zeros.
template <typename T, int V, int R>
__device__ __forceinline__ Pairs<Arithmetic<T>, V> moments_of(const Vector<T, V> (&rows)[R],
                                                              int count) {
  using A = Arithmetic<T>;
  Pairs<A, V> own = Pairs<A, V>::zero();
  own.count = A(count);
  A values[V];
#pragma unroll
  for (int i = 0; i < R; ++i) {
    unpack(rows[i], values);
#pragma unroll
    for (int v = 0; v < V; ++v) own.first[v] += values[v];
  }
  const A share = A(1) / own.count;
#pragma unroll
  for (int v = 0; v < V; ++v) own.first[v] *= share;
#pragma unroll
  for (int i = 0; i < R; ++i) {
    unpack(rows[i], values);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const A delta = i < count ? values[v] - own.first[v] : A(0);
      own.second[v] += delta * delta;
    }
  }
  return own;
}

struct MergeSums {
  static constexpr int kRows = tiling::kNormSumRows;
  static constexpr bool kCounts = false;

  template <typename A, int V>
  __device__ __forceinline__ static void merge(Pairs<A, V>& left, const Pairs<A, V>& right) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      left.first[v] += right.first[v];
      left.second[v] += right.second[v];
    }
  }
};

// Shared memory of block_merge: a plane for each value, pitched so that the transposition back to
// consecutive channels meets no bank twice.
template <typename A, int V>
constexpr int kPlanePitch = kColumnThreads + 128 / int(sizeof(A)) / V;
template <typename Merge, typename A, int V>
constexpr int64_t kMergeBytes = (2 * V + Merge::kCounts) * kPlanePitch<A, V> * int64_t(sizeof(A));

// Merges what all threads of a block hold of the same channels, and writes the block's partial
// result, [Merge::kRows][channels]. Neighbouring threads hold neighbouring channels, as in
// tiling/columns.h.
template <typename Merge, typename A, int V>
__device__ __forceinline__ void block_merge(const Columns& plan, const ColumnThread& at,
                                            Pairs<A, V>& pairs, A* partials) {
  using namespace device;
  A* const shared = reinterpret_cast<A*>(shared_memory());
  const auto plane = [&](int value) { return shared + value * kPlanePitch<A, V>; };
  const int thread = thread_index();
  int half = 1;
  while (half < plan.lanes) half *= 2;
  for (half /= 2;; half /= 2) {
    // The last round (half 0) leaves the result of lane 0 in shared memory.
    if (at.active && at.lane >= half && at.lane < (half ? 2 * half : 1)) {
      if constexpr (Merge::kCounts) shared_store(plane(2 * V) + thread, pairs.count);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        shared_store(plane(v) + thread, pairs.first[v]);
        shared_store(plane(V + v) + thread, pairs.second[v]);
      }
    }
    sync_threads();
    if (half == 0) break;
    if (at.active && at.lane < half && at.lane + half < plan.lanes) {
      const int other = thread + half * plan.group_vectors;
      Pairs<A, V> right;
      if constexpr (Merge::kCounts) right.count = shared_load<A>(plane(2 * V) + other);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        right.first[v] = shared_load<A>(plane(v) + other);
        right.second[v] = shared_load<A>(plane(V + v) + other);
      }
      Merge::merge(pairs, right);
    }
    sync_threads();
  }
  const int first = block_y() * plan.group_vectors * V;
  const int count = min(plan.group_vectors * V, plan.channels - first);
  A* const out = partials + int64_t(block_x()) * Merge::kRows * plan.channels + first;
  for (int c = thread; c < count; c += kColumnThreads) {
    A* to = out + c;
    if constexpr (Merge::kCounts) {
      global_store(to, shared_load<A>(plane(2 * V) + c / V));
      to += plan.channels;
    }
    global_store(to, shared_load<A>(plane(c % V) + c / V));
    global_store(to + plan.channels, shared_load<A>(plane(V + c % V) + c / V));
  }
}

}  // namespace densenet_efficient
