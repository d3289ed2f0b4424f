// channel_stats: mean and biased variance of each column of x [M, C].
//
// A tile of rows is read twice, the second time from the cache: M * C elements from memory. Tasks
// are groups of neighbouring tiles; a group's moments are kept in double and merged in order.
#include "rows/moments.h"

namespace densenet_efficient::cpu {
namespace {

template <typename T>
void run(const arguments::ChannelStats& call) {
  using A = Arithmetic<T>;
  const int64_t slots = threads();
  const tiling::ChannelStats plan(call.M, call.C, sizeof(A), slots);
  Workspace workspace(call.lead.tensor, plan.bytes);
  GroupMoments moments(workspace, plan.groups.groups, call.C);
  A* spare = workspace.take<A>(slots * moments.kSpare * call.C);
  const auto x = input_rows<T>(call.x);
  parallel(plan.groups.groups, [&](int64_t group) {
    A* own = spare + own_slot(slots) * moments.kSpare * call.C;
    for (int64_t tile = plan.groups.first(group); tile < plan.groups.first(group + 1); ++tile)
      moments.add<T>(group, {x[plan.tiles.first(tile)], x.stride}, plan.tiles.count(tile), own);
  });
  moments.finish(output_rows<A>(call.stats));
}

void channel_stats(Tensor x, Tensor stats) {
  const arguments::ChannelStats call(x, stats);
  dispatch_activation(x.scalar_type(), [&]<typename T>(T) { run<T>(call); });
}

}  // namespace
}  // namespace densenet_efficient::cpu

STABLE_TORCH_LIBRARY_IMPL(densenet_efficient, CPU, library) {
  library.impl("channel_stats", TORCH_BOX(&densenet_efficient::cpu::channel_stats));
}
