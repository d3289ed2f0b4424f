// The second pass of every reduction over blocks: partial results in a workspace, one per block of
// the first pass, are combined in a fixed order, so that two runs give the same bits.
//
// A block combines 32 columns: eight groups of threads take one eighth of the partials each, in
// order; their eight results are then taken in order. Reads each partial once.
#pragma once

#include "../device.cuh"
#include "../launch.h"

namespace densenet_efficient {

// partial [blocks, 3, columns]: count, mean, M2. stats [2, columns]: mean, biased variance.
struct MomentPartials {
  const float* partial;
  int blocks;
  int columns;
  float* stats;
  int64_t stats_stride;
};

// partial [blocks, rows, taps, pitch], of which `columns` of each row are summed over the blocks,
// to out [rows, columns, taps] with a stride between its rows.
struct SumPartials {
  const float* partial = nullptr;
  int blocks = 0;
  int rows = 0;
  int columns = 0;
  int64_t pitch = 0;
  int64_t block_stride = 0;  // between the partials of two blocks
  float* out = nullptr;
  int64_t out_stride = 0;
  bool accumulate = false;  // add to what stands there
};

namespace partials {

constexpr int kColumns = 32, kGroups = 8, kThreads = kColumns * kGroups;

__device__ __forceinline__ int group_begin(int group, int blocks) {
  return static_cast<int>(static_cast<int64_t>(group) * blocks / kGroups);
}

// Instantiated by the files that include this header.
template <int = 0>
__global__ void __launch_bounds__(kThreads) merge_moments_kernel(MomentPartials args) {
  using namespace device;
  float* shared = reinterpret_cast<float*>(shared_memory());  // [3, groups, columns]
  const int c = thread_index() % kColumns, group = thread_index() / kColumns;
  const int column = block_x() * kColumns + c;
  Moments<float> all{0, 0, 0};
  if (column < args.columns) {
    const int end = group_begin(group + 1, args.blocks);
    for (int b = group_begin(group, args.blocks); b < end; ++b) {
      const float* from = args.partial + int64_t(b) * 3 * args.columns + column;
      all = merge(all,
                  Moments<float>{global_load<float>(from), global_load<float>(from + args.columns),
                                 global_load<float>(from + 2 * args.columns)});
    }
  }
  shared_store(shared + thread_index(), all.count);
  shared_store(shared + kThreads + thread_index(), all.mean);
  shared_store(shared + 2 * kThreads + thread_index(), all.m2);
  sync_threads();
  if (group > 0 || column >= args.columns) return;
  for (int other = 1; other < kGroups; ++other) {
    const float* from = shared + other * kColumns + c;
    all = merge(all, Moments<float>{shared_load<float>(from), shared_load<float>(from + kThreads),
                                    shared_load<float>(from + 2 * kThreads)});
  }
  global_store(args.stats + kStatsMean * args.stats_stride + column, all.mean);
  global_store(args.stats + kStatsVar * args.stats_stride + column,
               all.count > 0.0f ? all.m2 / all.count : 0.0f);
}

// Shared memory: [groups, columns, taps], as the result lies; one or nine taps, so that neither
// writing a tap nor reading the result meets a bank twice.
template <int kTaps>
constexpr int kSumBytes = kGroups * kTaps * kColumns * 4;

template <int kTaps>
__device__ __forceinline__ void sum_block(const SumPartials& args) {
  using namespace device;
  float* shared = reinterpret_cast<float*>(shared_memory());
  const int panels = (args.columns + kColumns - 1) / kColumns;
  if (block_x() >= args.rows * panels) return;
  const int row = block_x() / panels, column0 = block_x() % panels * kColumns;
  const int c = thread_index() % kColumns, group = thread_index() / kColumns;
  float sums[kTaps] = {};
  if (column0 + c < args.columns) {
    const float* from = args.partial + int64_t(row) * kTaps * args.pitch + column0 + c;
    const int end = group_begin(group + 1, args.blocks);
#pragma unroll(kTaps == 1 ? 8 : 2)
    for (int b = group_begin(group, args.blocks); b < end; ++b) {
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap)
        sums[tap] += global_load<float>(from + b * args.block_stride + tap * args.pitch);
    }
  }
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap)
    shared_store(shared + (group * kColumns + c) * kTaps + tap, sums[tap]);
  sync_threads();
  const int columns = args.columns - column0 < kColumns ? args.columns - column0 : kColumns;
  for (int i = thread_index(); i < columns * kTaps; i += kThreads) {
    float sum = 0.0f;
    for (int from = 0; from < kGroups; ++from)
      sum += shared_load<float>(shared + from * kColumns * kTaps + i);
    float* out = args.out + row * args.out_stride + column0 * kTaps + i;
    global_store(out, args.accumulate ? global_load<float>(out) + sum : sum);
  }
}

// The sum of rows with kTaps taps and, by the blocks with block_y() == 1, of plain rows.
template <int kTaps>
__global__ void __launch_bounds__(kThreads)
    sum_partials_kernel(SumPartials taps, SumPartials plain) {
  if (device::block_y() == 0)
    sum_block<kTaps>(taps);
  else
    sum_block<1>(plain);
}

}  // namespace partials

// Writes the stats, where they are wanted.
inline void merge_moments(const Launcher& launcher, const float* partial, int64_t blocks,
                          int64_t columns, const Strided& stats) {
  if (!stats || columns == 0) return;
  const auto rows = output_rows<float>(stats);
  const MomentPartials args{partial, static_cast<int>(blocks), static_cast<int>(columns), rows.data,
                            rows.stride};
  launcher.launch<&partials::merge_moments_kernel<>>(
      {ceil_div(args.columns, partials::kColumns), 1, partials::kThreads,
       3 * partials::kThreads * 4},
      args);
}

// A weight gradient (none if it has no rows) and the sums of a norm, in one launch.
template <int kTaps>
void sum_partials(const Launcher& launcher, const SumPartials& weight, const SumPartials& norm) {
  const auto blocks = [](const SumPartials& args) {
    return args.rows * ceil_div(args.columns, partials::kColumns);
  };
  const int64_t most = std::max(blocks(weight), blocks(norm));
  if (most == 0) return;
  launcher.launch<&partials::sum_partials_kernel<kTaps>>(
      {most, 2, partials::kThreads, partials::kSumBytes<kTaps>}, weight, norm);
}

}  // namespace densenet_efficient
