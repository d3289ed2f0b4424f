// The second pass of every reduction over blocks: the partial results of the first pass, one per
// block (tiling/partials.h), are combined in a fixed order, so that two runs give the same bits.
//
// There is little to compute and all of it waits for memory: a thread therefore asks for a whole
// batch of partials before it uses the first, and as many threads as a block holds share the
// partials of a few channels. Reads each partial once.
//
// The kernels bear their operators' names, so that a profile says whose second pass it sees: an
// operator's file defines one that calls finish_moments or finish_sums, and launches it by
// launch_finish.
#pragma once

#include "../device.cuh"
#include "../launch.h"
#include "../tiling/partials.h"

namespace densenet_efficient {

// ---- Moments ------------------------------------------------------------------------------------

// A block combines eight channels, which fill a sector of float32: of each warp four groups of
// eight lanes, each with every 64th partial.
constexpr int kMomentThreads = 512, kMomentChannels = 8;
constexpr int kMomentGroups = kMomentThreads / kMomentChannels;
constexpr int kMomentWarps = kMomentThreads / 32, kWarpGroups = 32 / kMomentChannels;
constexpr int kMomentBatch = 8;  // partials of a thread that are under way at once

// partial [blocks][3][channels] to stats [2, channels]: mean, biased variance (0 of no rows).
template <typename A>
struct MomentPartials {
  const A* partial;
  int blocks;
  int channels;
  Rows<A> stats;
};

// The moments of all sets, by exact two-pass; an empty set's mean must be finite.
template <typename A, int kSets>
__device__ __forceinline__ Moments<A> merge_all(const Moments<A> (&sets)[kSets]) {
  Moments<A> all{0, 0, 0};
#pragma unroll
  for (int i = 0; i < kSets; ++i) {
    all.count += sets[i].count;
    all.mean += sets[i].count * sets[i].mean;
  }
  all.mean = all.count > A(0) ? all.mean / all.count : A(0);
#pragma unroll
  for (int i = 0; i < kSets; ++i) {
    const A delta = sets[i].mean - all.mean;
    all.m2 += sets[i].m2 + sets[i].count * delta * delta;
  }
  return all;
}

// The moments of a warp's groups, for each lane those of its channel.
template <typename A>
__device__ __forceinline__ Moments<A> merge_groups(const Moments<A>& own) {
  using namespace device;
  Moments<A> sets[kWarpGroups];
#pragma unroll
  for (int group = 0; group < kWarpGroups; ++group) {
    const int lane = group * kMomentChannels + lane_index() % kMomentChannels;
    sets[group] = {shuffle(own.count, lane), shuffle(own.mean, lane), shuffle(own.m2, lane)};
  }
  return merge_all(sets);
}

// Means are measured from the first block's: where they are far from zero, no digit of their
// differences is lost.
template <typename A>
__device__ __forceinline__ void finish_moments(const MomentPartials<A>& args) {
  using namespace device;
  const int channel = block_x() * kMomentChannels + thread_index() % kMomentChannels;
  const int64_t pitch = args.channels;
  Moments<A> all{0, 0, 0};
  A pivot = A(0);
  if (channel < args.channels && args.blocks > 0) {
    const A* const from = args.partial + channel;
    pivot = global_load_constant<A>(from + pitch);
    constexpr int kStep = kMomentBatch * kMomentGroups;
    for (int first = thread_index() / kMomentChannels; first < args.blocks; first += kStep) {
      Moments<A> sets[kMomentBatch + 1];
#pragma unroll
      for (int i = 0; i < kMomentBatch; ++i) {
        const int block = first + i * kMomentGroups;
        sets[i] = {0, pivot, 0};
        if (block >= args.blocks) continue;
        const A* const own = from + block * tiling::kMomentRows * pitch;
        sets[i] = {global_load_constant<A>(own), global_load_constant<A>(own + pitch),
                   global_load_constant<A>(own + 2 * pitch)};
      }
#pragma unroll
      for (int i = 0; i < kMomentBatch; ++i) sets[i].mean -= pivot;
      sets[kMomentBatch] = all;
      all = merge_all(sets);
    }
  }
  all = merge_groups(all);
  // The warps', [count, mean, M2][warps][channels], by the first warp: each of its groups takes
  // every fourth.
  A* const shared = reinterpret_cast<A*>(shared_memory());
  constexpr int kRow = kMomentWarps * kMomentChannels;
  if (lane_index() < kMomentChannels) {
    A* const own = shared + thread_index() / 32 * kMomentChannels + lane_index();
    shared_store(own, all.count);
    shared_store(own + kRow, all.mean);
    shared_store(own + 2 * kRow, all.m2);
  }
  sync_threads();
  if (thread_index() >= 32) return;
  Moments<A> sets[kMomentWarps / kWarpGroups];
#pragma unroll
  for (int i = 0; i < kMomentWarps / kWarpGroups; ++i) {
    const A* const of_warp = shared + i * 32 + lane_index();
    sets[i] = {shared_load<A>(of_warp), shared_load<A>(of_warp + kRow),
               shared_load<A>(of_warp + 2 * kRow)};
  }
  all = merge_groups(merge_all(sets));
  if (lane_index() >= kMomentChannels || channel >= args.channels) return;
  global_store(args.stats[kStatsMean] + channel, pivot + all.mean);
  global_store(args.stats[kStatsVar] + channel, all.count > A(0) ? all.m2 / all.count : A(0));
}

// Launches the operator's kernel, where the stats are wanted.
template <auto kernel, typename A>
void launch_finish(const Launcher& launcher, const A* partial, int64_t blocks, int64_t channels,
                   const Strided& stats) {
  if (!stats || channels == 0) return;
  constexpr int64_t kShared = kMomentWarps * kMomentChannels * tiling::kMomentRows * sizeof(A);
  launcher.launch<kernel>({.grid_x = ceil_div(channels, kMomentChannels),
                           .block = kMomentThreads,
                           .shared_bytes = kShared},
                          MomentPartials<A>{partial, static_cast<int>(blocks),
                                            static_cast<int>(channels), output_rows<A>(stats)});
}

// ---- Sums ---------------------------------------------------------------------------------------

// A block combines 32 channels: eight groups of threads take one eighth of the partials each, in
// order; their eight results are then taken in order.
constexpr int kSumChannels = 32, kSumGroups = 8;
constexpr int kSumThreads = kSumChannels * kSumGroups;

// Shared memory: [groups][channels][values]; one or nine values, so that neither writing one
// of them nor reading all meets a bank twice.
template <typename A>
constexpr int64_t finish_bytes(int values) {
  return int64_t(kSumThreads) * values * sizeof(A);
}

// Calls f(block) for the blocks whose partials this thread's group combines, in order.
template <int kUnroll, typename F>
__device__ __forceinline__ void for_own_blocks(int blocks, F f) {
  const int64_t group = device::thread_index() / kSumChannels;
  const int begin = static_cast<int>(group * blocks / kSumGroups);
  const int end = static_cast<int>((group + 1) * blocks / kSumGroups);
#pragma unroll(kUnroll)
  for (int block = begin; block < end; ++block) f(block);
}

// partial [blocks][rows][taps][pitch], of which `channels` of each row are summed over the blocks,
// to out [rows, channels, taps] with a stride between its rows. Nothing where there are no rows.
template <typename A>
struct SumPartials {
  const A* partial = nullptr;
  int blocks = 0;
  int rows = 0;
  int channels = 0;
  int64_t pitch = 0;
  int64_t block_stride = 0;  // between the partials of two blocks
  Rows<A> out{};
  bool accumulate = false;  // add to what out holds

  int64_t work() const { return rows * ceil_div(channels, kSumChannels); }
};

// The sums of a norm, [blocks][2][pitch], to dnorm [2, channels].
template <typename A>
SumPartials<A> norm_sums(const A* partial, int64_t blocks, int64_t channels, int64_t pitch,
                         Rows<A> dnorm) {
  return {.partial = partial,
          .blocks = static_cast<int>(blocks),
          .rows = kDnormRows,
          .channels = static_cast<int>(channels),
          .pitch = pitch,
          .block_stride = kDnormRows * pitch,
          .out = dnorm};
}

// The sums of a weight gradient, [blocks][outputs][taps][pitch], to dweight [outputs, channels,
// taps].
template <typename A>
SumPartials<A> weight_sums(const A* partial, int64_t blocks, int64_t outputs, int64_t channels,
                           int taps, int64_t pitch, A* dweight) {
  return {.partial = partial,
          .blocks = static_cast<int>(blocks),
          .rows = static_cast<int>(outputs),
          .channels = static_cast<int>(channels),
          .pitch = pitch,
          .block_stride = outputs * taps * pitch,
          .out = {dweight, channels * taps}};
}

template <int kTaps, typename A>
__device__ __forceinline__ void finish_rows(const SumPartials<A>& args) {
  using namespace device;
  A* const shared = reinterpret_cast<A*>(shared_memory());
  const int panels = (args.channels + kSumChannels - 1) / kSumChannels;
  if (block_x() >= args.rows * panels) return;
  const int row = block_x() / panels, channel0 = block_x() % panels * kSumChannels;
  const int c = thread_index() % kSumChannels;
  A sums[kTaps] = {};
  if (channel0 + c < args.channels) {
    const A* const from = args.partial + int64_t(row) * kTaps * args.pitch + channel0 + c;
    for_own_blocks<kTaps == 1 ? 8 : 2>(args.blocks, [&](int block) {
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap)
        sums[tap] += global_load<A>(from + block * args.block_stride + tap * args.pitch);
    });
  }
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap)
    shared_store(shared + thread_index() * kTaps + tap, sums[tap]);
  sync_threads();
  const int channels = min(args.channels - channel0, kSumChannels);
  for (int i = thread_index(); i < channels * kTaps; i += kSumThreads) {
    A sum = A(0);
    for (int group = 0; group < kSumGroups; ++group)
      sum += shared_load<A>(shared + group * kSumChannels * kTaps + i);
    A* const out = args.out[row] + channel0 * kTaps + i;
    global_store(out, args.accumulate ? global_load<A>(out) + sum : sum);
  }
}

// The sums of a weight gradient with kTaps taps and, by the blocks with block_y() == 1, of a norm.
template <int kTaps, typename A>
__device__ __forceinline__ void finish_sums(const SumPartials<A>& weight,
                                            const SumPartials<A>& norm) {
  if (device::block_y() == 0)
    finish_rows<kTaps>(weight);
  else
    finish_rows<1>(norm);
}

// A weight gradient (none if it has no rows) and the sums of a norm, in one launch of the
// operator's kernel.
template <auto kernel, int kTaps, typename A>
void launch_finish(const Launcher& launcher, const SumPartials<A>& weight,
                   const SumPartials<A>& norm) {
  const int64_t most = std::max(weight.work(), norm.work());
  if (most == 0) return;
  launcher.launch<kernel>(
      {.grid_x = most, .grid_y = 2, .block = kSumThreads, .shared_bytes = finish_bytes<A>(kTaps)},
      weight, norm);
}

}  // namespace densenet_efficient
