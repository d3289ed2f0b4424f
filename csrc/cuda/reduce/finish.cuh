// The second pass of every reduction over blocks: the partial results of the first pass, one per
// block (tiling/partials.h), are combined in a fixed order, so that two runs give the same bits.
//
// A block of this pass combines 32 channels: eight groups of threads take one eighth of the
// partials each, in order; their eight results are then taken in order. Reads each partial once.
//
// The kernels bear their operators' names, so that a profile says whose second pass it sees: an
// operator's file defines one that calls finish_moments or finish_sums, and launches it by
// launch_finish.
#pragma once

#include "../device.cuh"
#include "../launch.h"
#include "../tiling/partials.h"

namespace densenet_efficient {

constexpr int kFinishChannels = 32, kFinishGroups = 8;
constexpr int kFinishThreads = kFinishChannels * kFinishGroups;

// Shared memory: [groups][channels][values]; one, three or nine values, so that neither writing one
// of them nor reading all meets a bank twice.
template <typename A>
constexpr int64_t finish_bytes(int values) {
  return int64_t(kFinishThreads) * values * sizeof(A);
}

// Calls f(block) for the blocks whose partials this thread's group combines, in order.
template <int kUnroll, typename F>
__device__ __forceinline__ void for_own_blocks(int blocks, F f) {
  const int64_t group = device::thread_index() / kFinishChannels;
  const int begin = static_cast<int>(group * blocks / kFinishGroups);
  const int end = static_cast<int>((group + 1) * blocks / kFinishGroups);
#pragma unroll(kUnroll)
  for (int block = begin; block < end; ++block) f(block);
}

// ---- Moments ------------------------------------------------------------------------------------

// partial [blocks][3][channels] to stats [2, channels]: mean, biased variance (0 of no rows).
template <typename A>
struct MomentPartials {
  const A* partial;
  int blocks;
  int channels;
  Rows<A> stats;
};

template <typename A>
__device__ __forceinline__ void finish_moments(const MomentPartials<A>& args) {
  using namespace device;
  constexpr int kValues = tiling::kMomentRows;
  A* const shared = reinterpret_cast<A*>(shared_memory());
  const int channel = block_x() * kFinishChannels + thread_index() % kFinishChannels;
  const int64_t pitch = args.channels;
  Moments<A> all{0, 0, 0};
  if (channel < args.channels)
    for_own_blocks<4>(args.blocks, [&](int block) {
      const A* const from = args.partial + block * kValues * pitch + channel;
      all = merge(all, Moments<A>{global_load<A>(from), global_load<A>(from + pitch),
                                  global_load<A>(from + 2 * pitch)});
    });
  A* const own = shared + thread_index() * kValues;
  shared_store(own, all.count);
  shared_store(own + 1, all.mean);
  shared_store(own + 2, all.m2);
  sync_threads();
  if (thread_index() >= kFinishChannels || channel >= args.channels) return;
  for (int group = 1; group < kFinishGroups; ++group) {
    const A* const from = own + group * kFinishChannels * kValues;
    all = merge(
        all, Moments<A>{shared_load<A>(from), shared_load<A>(from + 1), shared_load<A>(from + 2)});
  }
  global_store(args.stats[kStatsMean] + channel, all.mean);
  global_store(args.stats[kStatsVar] + channel, all.count > A(0) ? all.m2 / all.count : A(0));
}

// Launches the operator's kernel, where the stats are wanted.
template <auto kernel, typename A>
void launch_finish(const Launcher& launcher, const A* partial, int64_t blocks, int64_t channels,
                   const Strided& stats) {
  if (!stats || channels == 0) return;
  launcher.launch<kernel>({.grid_x = ceil_div(channels, kFinishChannels),
                           .block = kFinishThreads,
                           .shared_bytes = finish_bytes<A>(tiling::kMomentRows)},
                          MomentPartials<A>{partial, static_cast<int>(blocks),
                                            static_cast<int>(channels), output_rows<A>(stats)});
}

// ---- Sums ---------------------------------------------------------------------------------------

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

  int64_t work() const { return rows * ceil_div(channels, kFinishChannels); }
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
  const int panels = (args.channels + kFinishChannels - 1) / kFinishChannels;
  if (block_x() >= args.rows * panels) return;
  const int row = block_x() / panels, channel0 = block_x() % panels * kFinishChannels;
  const int c = thread_index() % kFinishChannels;
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
  const int channels = min(args.channels - channel0, kFinishChannels);
  for (int i = thread_index(); i < channels * kTaps; i += kFinishThreads) {
    A sum = A(0);
    for (int group = 0; group < kFinishGroups; ++group)
      sum += shared_load<A>(shared + group * kFinishChannels * kTaps + i);
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
  launcher.launch<kernel>({.grid_x = most,
                           .grid_y = 2,
                           .block = kFinishThreads,
                           .shared_bytes = finish_bytes<A>(kTaps)},
                          weight, norm);
}

}  // namespace densenet_efficient
