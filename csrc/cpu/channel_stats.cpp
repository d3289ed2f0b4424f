// channel_stats: mean and biased variance of each column of x [M, C].
//
// A tile of rows is read twice, the second time from the cache: M * C elements from memory. Tasks
// are groups of neighbouring tiles; a group's moments are kept in double and merged in order.
#include "moments.h"

namespace densenet_efficient::cpu {
namespace {

template <typename T>
void run(const Tensor& x, int64_t x_stride, const Tensor& stats, int64_t stats_stride) {
  using A = Arithmetic<T>;
  const int64_t channels = x.size(1), slots = threads();
  const workspace::cpu::ChannelStats plan(x.size(0), channels, sizeof(A), slots);
  Workspace workspace(x, plan.bytes);
  GroupMoments moments(workspace, plan.groups.groups, channels);
  A* spare = workspace.take<A>(slots * moments.kSpare * channels);
  const auto rows = input_rows<T>(x, x_stride);
  parallel(plan.groups.groups, [&](int64_t group) {
    A* own = spare + own_slot(slots) * moments.kSpare * channels;
    for (int64_t tile = plan.groups.first(group); tile < plan.groups.first(group + 1); ++tile)
      moments.add<T>(group, {rows[plan.tiles.first(tile)], x_stride}, plan.tiles.count(tile), own);
  });
  moments.finish(output_rows<A>(stats, stats_stride));
}

void channel_stats(Tensor x, Tensor stats) {
  const char* op = "channel_stats";
  check_dim({op, "x", x}, 2);
  const ScalarType accumulate = check_activation_dtype({op, "x", x});
  const int64_t x_stride = check_rows({op, "x", x});
  const int64_t stats_stride =
      check_table({op, "stats", stats}, kStatsRows, x.size(1), accumulate, x, "x");
  DE_DISPATCH(x.scalar_type(), T, run<T>(x, x_stride, stats, stats_stride));
}

}  // namespace
}  // namespace densenet_efficient::cpu

STABLE_TORCH_LIBRARY_IMPL(densenet_efficient, CPU, library) {
  library.impl("channel_stats", TORCH_BOX(&densenet_efficient::cpu::channel_stats));
}
