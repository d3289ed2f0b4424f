// Sums and moments over rows, in two steps of fixed order: a block merges what its threads hold and
// writes one partial result per channel; a second, small kernel merges the blocks' partials. The
// same shape gives the same bits, whatever the schedule.
#pragma once

#include "../launch.h"
#include "../tiling/columns.h"
#include "../vector.cuh"

namespace densenet_efficient {

// Two numbers for each of V channels, and how many rows they stand for: (mean, M2) or two sums.
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
  template <typename A, int V>
  __device__ __forceinline__ static void merge(Pairs<A, V>& left, const Pairs<A, V>& right) {
    left.count += right.count;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      left.first[v] += right.first[v];
      left.second[v] += right.second[v];
    }
  }
};

// A block's partial result lies at partials[block_x][2][channels]; behind all of these, the number
// of rows that each block's result stands for.
inline int64_t partials_size(int64_t parts, int64_t channels) { return parts * (2 * channels + 1); }

// Shared memory of block_merge: a plane for each value, pitched so that the transposition back to
// consecutive channels meets no bank twice.
template <typename A, int V>
constexpr int kPlanePitch = kColumnThreads + 128 / int(sizeof(A)) / V;
template <typename A, int V>
constexpr int64_t kMergeBytes = (2 * V + 1) * kPlanePitch<A, V> * int64_t(sizeof(A));

// Merges what all threads of a block hold of the same channels, and writes the block's partial
// result. Neighbouring threads hold neighbouring channels, as in tiling/columns.h.
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
      shared_store(plane(2 * V) + thread, pairs.count);
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
      right.count = shared_load<A>(plane(2 * V) + other);
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
  A* const out = partials + int64_t(block_x()) * 2 * plan.channels + first;
  for (int c = thread; c < count; c += kColumnThreads) {
    global_store(out + c, shared_load<A>(plane(c % V) + c / V));
    global_store(out + plan.channels + c, shared_load<A>(plane(V + c % V) + c / V));
  }
  if (thread == 0 && block_y() == 0)
    global_store(partials + int64_t(grid_x()) * 2 * plan.channels + block_x(), pairs.count);
}

constexpr int kFinishChannels = 32;
constexpr int kFinishLanes = kColumnThreads / kFinishChannels;

// Merges the blocks' partial results: lane j takes parts j, j + lanes, ..., then the lanes merge in
// a tree. Finish turns the result into two rows of a table.
template <typename Merge, typename Finish, typename A>
__global__ void __launch_bounds__(kColumnThreads)
    finish_kernel(const A* partials, int64_t parts, int channels, Rows<A> table, Finish finish) {
  using namespace device;
  A* const shared = reinterpret_cast<A*>(shared_memory());
  const int thread = thread_index(), lane = thread / kFinishChannels;
  const int channel = block_x() * kFinishChannels + thread % kFinishChannels;
  Pairs<A, 1> pair = Pairs<A, 1>::zero();
  if (channel < channels) {
#pragma unroll 4
    for (int64_t part = lane; part < parts; part += kFinishLanes) {
      const A* const values = partials + part * 2 * channels + channel;
      Merge::merge(pair, Pairs<A, 1>{global_load<A>(partials + parts * 2 * channels + part),
                                     {global_load<A>(values)},
                                     {global_load<A>(values + channels)}});
    }
  }
  for (int half = kFinishLanes / 2; half > 0; half /= 2) {
    if (lane >= half && lane < 2 * half) {
      shared_store(shared + thread, pair.count);
      shared_store(shared + kColumnThreads + thread, pair.first[0]);
      shared_store(shared + 2 * kColumnThreads + thread, pair.second[0]);
    }
    sync_threads();
    if (lane < half) {
      const A* const other = shared + thread + half * kFinishChannels;
      Merge::merge(pair, Pairs<A, 1>{shared_load<A>(other),
                                     {shared_load<A>(other + kColumnThreads)},
                                     {shared_load<A>(other + 2 * kColumnThreads)}});
    }
    sync_threads();
  }
  if (lane == 0 && channel < channels) finish(pair, channel, table);
}

// stats [2, C] from moments.
struct FinishStats {
  template <typename A>
  __device__ __forceinline__ void operator()(const Pairs<A, 1>& pair, int channel,
                                             Rows<A> stats) const {
    device::global_store(stats[kStatsMean] + channel, pair.first[0]);
    device::global_store(stats[kStatsVar] + channel, pair.second[0] / pair.count);
  }
};

// dnorm [2, C] from the sums of dz * x_hat and dz.
struct FinishDnorm {
  template <typename A>
  __device__ __forceinline__ void operator()(const Pairs<A, 1>& pair, int channel,
                                             Rows<A> dnorm) const {
    device::global_store(dnorm[kDgamma] + channel, pair.first[0]);
    device::global_store(dnorm[kDbeta] + channel, pair.second[0]);
  }
};

template <typename Merge, typename Finish, typename A>
void finish_partials(const Launcher& launcher, const A* partials, int64_t parts, int64_t channels,
                     Rows<A> table) {
  launcher.launch<&finish_kernel<Merge, Finish, A>>(
      {.grid_x = ceil_div(channels, kFinishChannels),
       .block = kColumnThreads,
       .shared_bytes = 3 * kColumnThreads * int64_t(sizeof(A))},
      partials, parts, static_cast<int>(channels), table, Finish{});
}

}  // namespace densenet_efficient
