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

#include <limits>
#include <type_traits>

#include "../device.cuh"
#include "../launch.h"
#include "../tiling/partials.h"
#include "../vector.cuh"
#include "tables.cuh"

namespace densenet_efficient {

// ---- Moments ------------------------------------------------------------------------------------

// A block combines eight channels, which fill a sector of float32: of each warp four groups of
// eight lanes, each with every 64th partial.
constexpr int kMomentThreads = 512, kMomentChannels = 8;
constexpr int kMomentGroups = kMomentThreads / kMomentChannels;
constexpr int kMomentWarps = kMomentThreads / 32, kWarpGroups = 32 / kMomentChannels;
constexpr int kMomentBatch = 8;  // partials of a thread that are under way at once

// partial [blocks][3][channels] to stats [2, channels]: mean, biased variance (0 of no rows). Then,
// where there is one, the norm that reads these channels and others, whose statistics are there
// already: by blocks of their own.
template <typename A>
struct MomentPartials {
  const A* partial;
  int blocks;
  int channels;
  Rows<A> stats;
  NextFold<A> next{};

  DE_HOST_DEVICE int own_grid() const { return (channels + kMomentChannels - 1) / kMomentChannels; }
};

// Of the channels that the next norm reads besides the operator's own, as many as a block has
// threads.
template <typename A>
__device__ __forceinline__ void fold_others(const MomentPartials<A>& args) {
  using namespace device;
  const NextFold<A>& next = args.next;
  const int other = (block_x() - args.own_grid()) * kMomentThreads + thread_index();
  const int channel = other < next.first ? other : other + args.channels;
  if (channel < next.channels)
    store_fold(next.norm, channel, global_load<A>(next.stats[kStatsMean] + channel),
               global_load<A>(next.stats[kStatsVar] + channel), next.gamma, next.beta, next.eps);
}

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
  if (block_x() >= args.own_grid()) return fold_others(args);
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
  const A mean = pivot + all.mean, variance = all.count > A(0) ? all.m2 / all.count : A(0);
  global_store(args.stats[kStatsMean] + channel, mean);
  global_store(args.stats[kStatsVar] + channel, variance);
  const NextFold<A>& next = args.next;
  if (next.norm.data)
    store_fold(next.norm, next.first + channel, mean, variance, next.gamma, next.beta, next.eps);
}

// Launches the operator's kernel, where the stats are wanted.
template <auto kernel, typename A>
void launch_finish(const Launcher& launcher, const A* partial, int64_t blocks, int64_t channels,
                   const Strided& stats, const arguments::FoldedNext& next = {}) {
  if (!stats || channels == 0) return;
  const MomentPartials<A> args{partial, static_cast<int>(blocks), static_cast<int>(channels),
                               output_rows<A>(stats), next_fold<A>(next)};
  constexpr int64_t kShared = kMomentWarps * kMomentChannels * tiling::kMomentRows * sizeof(A);
  const int64_t others = next.norm ? ceil_div(next.C - channels, kMomentThreads) : 0;
  launcher.launch<kernel>(
      {.grid_x = args.own_grid() + others, .block = kMomentThreads, .shared_bytes = kShared}, args);
}

// ---- Sums ---------------------------------------------------------------------------------------

// Some lanes are a team: they sum a piece, neighbouring values, over every groups-th block. As many
// teams share a piece as leave each of them one batch of partials, so that all are under way at
// once; the other teams of a block take further pieces.
constexpr int kSumThreads = 512;

// partial [blocks][rows][taps][pitch], of which `channels` of each row are summed over the blocks,
// to out [rows, channels, taps] with strides between rows, channels and taps. Nothing where there
// are no rows.
template <typename A>
struct SumPartials {
  const A* partial = nullptr;
  int blocks = 0;
  int rows = 0;
  int channels = 0;
  int pitch = 0;
  int64_t block_stride = 0;  // between the partials of two blocks
  Rows<A> out{};
  int channel_step = 1, tap_step = 1;  // of out
  bool accumulate = false;             // add to what out holds
  NormCorrection<A> correction{};      // of a norm's sums
  // Of this pass: teams that share a piece; values of a block, each with all taps; blocks; bytes
  // between the partials of a team.
  int groups = 1, span = 0, grid = 0, step_bytes = 0;

  template <typename Pass>
  void divide() {
    constexpr int kTeams = kSumThreads / Pass::kLanes;
    // A step between the partials of a team fits 32 bits.
    const int64_t size = std::max<int64_t>(1, block_stride * static_cast<int64_t>(sizeof(A)));
    const int64_t most = std::min<int64_t>(kTeams, std::numeric_limits<int>::max() / size);
    groups = static_cast<int>(
        std::clamp<int64_t>(ceil_div(blocks, Pass::kBatch), 1, std::max<int64_t>(1, most)));
    span = kTeams / groups * Pass::kLanes * Pass::kVector;
    grid = static_cast<int>(ceil_div(rows * pitch, span));
    step_bytes = static_cast<int>(groups * block_stride * static_cast<int64_t>(sizeof(A)));
  }
};

// The sums of a norm, [blocks][2][pitch], to dnorm [2, channels].
template <typename A>
SumPartials<A> norm_sums(const A* partial, int64_t blocks, int64_t channels, int64_t pitch,
                         Rows<A> dnorm) {
  return {.partial = partial,
          .blocks = static_cast<int>(blocks),
          .rows = kDnormRows,
          .channels = static_cast<int>(channels),
          .pitch = static_cast<int>(pitch),
          .block_stride = kDnormRows * pitch,
          .out = dnorm};
}

// The sums of a weight gradient, [blocks][outputs][taps][pitch], to dweight [outputs, channels,
// taps]. The pitch is a multiple of four.
template <typename A>
SumPartials<A> weight_sums(const A* partial, int64_t blocks, int64_t outputs, int64_t channels,
                           int taps, int64_t pitch, A* dweight, int64_t channel_step = 1,
                           int64_t tap_step = 1) {
  return {.partial = partial,
          .blocks = static_cast<int>(blocks),
          .rows = static_cast<int>(outputs),
          .channels = static_cast<int>(channels),
          .pitch = static_cast<int>(pitch),
          .block_stride = outputs * taps * pitch,
          .out = {dweight, channels * taps},
          .channel_step = static_cast<int>(channel_step),
          .tap_step = static_cast<int>(tap_step)};
}

// What a thread takes of a block's partials: neighbouring values, with all their taps.
template <int taps, int vector, int lanes, int batch>
struct SumPass {
  static constexpr int kTaps = taps, kVector = vector, kLanes = lanes;
  static constexpr int kBatch = batch;  // partials that are under way at once
  static_assert(taps == 1 || vector == 1);
};
template <typename A, int kTaps>
using WeightPass =
    std::conditional_t<kTaps == 1, SumPass<1, 16 / int(sizeof(A)), 8, 8>, SumPass<kTaps, 1, 16, 3>>;
// A norm may have any number of channels, but has few.
using NormPass = SumPass<1, 1, 8, 8>;

// The share of this pass's block `index`. Shared memory: [groups][span][taps].
template <typename Pass, typename A>
__device__ __forceinline__ void finish_values(const SumPartials<A>& args, int index) {
  using namespace device;
  constexpr int kTaps = Pass::kTaps, V = Pass::kVector;
  A* const shared = reinterpret_cast<A*>(shared_memory());
  const int values = args.rows * args.pitch, begin = index * args.span;
  const int own = thread_index() * V;
  const int group = own / args.span, value = begin + own % args.span;
  const int row = value / args.pitch, channel = value % args.pitch;
  const bool any = group < args.groups && value < values && channel < args.channels;
  const int end = any ? args.blocks : 0;
  const A* from =
      args.partial + group * args.block_stride + int64_t(row) * kTaps * args.pitch + channel;
  A sums[kTaps][V] = {};
  for (int first = 0; first < args.blocks; first += Pass::kBatch * args.groups) {
    Vector<A, V> batch[Pass::kBatch][kTaps];
#pragma unroll
    for (int i = 0; i < Pass::kBatch; ++i) {
      const A* const of_block = advance(from, i, args.step_bytes);
      const bool exists = first + group + i * args.groups < end;
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap) {
        batch[i][tap] = Vector<A, V>::zero();
        if (exists) batch[i][tap] = load_input<A, V>(of_block + tap * args.pitch);
      }
    }
#pragma unroll
    for (int i = 0; i < Pass::kBatch; ++i) {
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap) {
        A partial[V];
        unpack(batch[i][tap], partial);
#pragma unroll
        for (int v = 0; v < V; ++v) sums[tap][v] += partial[v];
      }
    }
    from = advance(from, Pass::kBatch, args.step_bytes);
  }
  if (group < args.groups) {
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap)
      shared_store(shared + own * kTaps + tap, pack<A, V>(sums[tap]).bits);
  }
  sync_threads();
  const int most = min(args.span, values - begin) * kTaps;
#pragma unroll 1
  for (int i = thread_index(); i < most; i += kSumThreads) {
    A sum = A(0);
#pragma unroll 8
    for (int of_group = 0; of_group < args.groups; ++of_group)
      sum += shared_load<A>(shared + of_group * args.span * kTaps + i);
    const int at = begin + i / kTaps, to_channel = at % args.pitch;
    if (to_channel >= args.channels) continue;
    A* const out =
        args.out[at / args.pitch] + to_channel * args.channel_step + i % kTaps * args.tap_step;
    if (args.accumulate) sum += global_load<A>(out);
    global_store(out, sum);
    if constexpr (std::is_same_v<Pass, NormPass>) {
      if (args.correction.table.data)
        store_correction(args.correction, static_cast<DnormRow>(at / args.pitch), to_channel, sum);
    }
  }
}

// The sums of a weight gradient with kTaps taps, then those of a norm.
template <int kTaps, typename A>
__device__ __forceinline__ void finish_sums(const SumPartials<A>& weight,
                                            const SumPartials<A>& norm) {
  if (device::block_x() < weight.grid)
    finish_values<WeightPass<A, kTaps>>(weight, device::block_x());
  else
    finish_values<NormPass>(norm, device::block_x() - weight.grid);
}

// A weight gradient (none if it has no rows) and the sums of a norm, in one launch of the
// operator's kernel.
template <auto kernel, int kTaps, typename A>
void launch_finish(const Launcher& launcher, SumPartials<A> weight, SumPartials<A> norm) {
  using Weight = WeightPass<A, kTaps>;
  weight.template divide<Weight>();
  norm.template divide<NormPass>();
  if (weight.grid + norm.grid == 0) return;
  constexpr int64_t kShared = kSumThreads * kTaps * Weight::kVector * sizeof(A);
  launcher.launch<kernel>(
      {.grid_x = weight.grid + norm.grid, .block = kSumThreads, .shared_bytes = kShared}, weight,
      norm);
}

}  // namespace densenet_efficient
