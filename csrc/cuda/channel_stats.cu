// channel_stats: mean and biased variance of each column of x [M, C].
//
//   mean = sum x / M, var = sum (x - mean)^2 / M
//
// A thread owns V neighbouring channels (one access of up to 16 bytes) and every lanes-th row of
// its block's part (tiling/columns.h). It keeps kLoads rows in registers: their mean, then their
// squared deviations from it, exactly, merged into the running moments by Chan's formula. Blocks
// merge through shared memory, their partials in a second kernel, always in the same order.
//
// Bytes moved: x once (M * C elements), the partials twice (2 * C per block), stats once.
#include "reduce/block.cuh"
#include "reduce/finish.cuh"
#include "workspace.h"

namespace densenet_efficient {
namespace {

using Tiling = tiling::ChannelStats;

template <typename T, int V>
__global__ void __launch_bounds__(kColumnThreads, 2)
    channel_stats_kernel(Rows<const T> x, Columns plan, Arithmetic<T>* partials) {
  using A = Arithmetic<T>;
  using namespace device;
  const ColumnThread at(plan, thread_index(), block_y());
  Pairs<A, V> pairs = Pairs<A, V>::zero();
  const int64_t first = block_x() * plan.part_rows;
  const int64_t end = first + plan.part_rows < plan.rows ? first + plan.part_rows : plan.rows;
  constexpr int kLoads = Tiling::kLoads;
  const int64_t step = int64_t(plan.lanes) * kLoads;
  for (int64_t base = first + at.lane; at.active && base < end; base += step) {
    Vector<T, V> tile[kLoads];
    int count = 0;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int64_t row = base + int64_t(i) * plan.lanes;
      if (row < end) {
        tile[i] = load_input<T, V>(x[row] + at.channel);
        count = i + 1;
      } else {
        tile[i] = Vector<T, V>::zero();
      }
    }
    MergeMoments::merge(pairs, moments_of(tile, count));
  }
  block_merge<MergeMoments>(plan, at, pairs, partials);
}

template <typename A>
__global__ void __launch_bounds__(kMomentThreads)
    channel_stats_finish_kernel(MomentPartials<A> args) {
  finish_moments(args);
}

void channel_stats(Tensor x, Tensor stats) {
  const arguments::ChannelStats call(x, stats);
  if (call.C == 0) return;
  const Launcher launcher(call.lead);
  dispatch_activation(x.scalar_type(), [&]<typename T>(T) {
    using A = Arithmetic<T>;
    if (call.M == 0) return clear_table(launcher, output_rows<A>(call.stats), kStatsRows, call.C);
    const Tiling tiling(call.M, call.C, sizeof(T), row_alignment({call.x}));
    const Columns& plan = tiling.columns;
    const Workspace partials(x, tiling.bytes);
    dispatch_width<16 / sizeof(T)>(plan.vector, [&]<int V>() {
      launcher.launch<&channel_stats_kernel<T, V>>(
          {.grid_x = plan.parts,
           .grid_y = plan.groups,
           .block = kColumnThreads,
           .shared_bytes = kMergeBytes<MergeMoments, A, V>},
          input_rows<T>(call.x), plan, partials.data<A>());
    });
    launch_finish<&channel_stats_finish_kernel<A>>(launcher, partials.data<const A>(), plan.parts,
                                                   call.C, call.stats);
  });
}

}  // namespace
}  // namespace densenet_efficient

DE_REGISTER(library) {
  library.impl("channel_stats", TORCH_BOX(&densenet_efficient::channel_stats));
}
