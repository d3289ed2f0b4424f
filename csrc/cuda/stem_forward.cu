// stem, forward: norm, ReLU and max-pool (3 x 3, stride 2, padding 1) of x [N, H, W, C] in one
// pass.
//
//   y = max over the window of relu(a * x + s)   [N, OH, OW, C], OH = ceil(H / 2), OW = ceil(W / 2)
//
// Who owns what: pool/stem.cuh. Bytes moved: x once (its columns asked for 1.5 times), y once, two
// partial moments per channel and block. Moments of y as stored, by exact two-pass over kGroup
// rows, merged by Chan's formula in a fixed order (reduce/finish.cuh).
#include "pool/stem.cuh"
#include "reduce/block.cuh"
#include "reduce/finish.cuh"
#include "workspace.h"

namespace densenet_efficient {
namespace {

constexpr int kGroup = 4;  // output rows whose moments are taken at once

template <typename T, int V>
__global__ void __launch_bounds__(kColumnThreads, 2)
    stem_forward_kernel(Rows<const T> x, Rows<const Arithmetic<T>> norm, Rows<T> y, StemTiling plan,
                        Arithmetic<T>* partials) {
  using A = Arithmetic<T>;
  const StemThread at(plan);
  Pairs<A, V> pairs = Pairs<A, V>::zero();
  const auto untagged = [](int, A) { return 0; };
  if (at.active) {
    A scale[V], shift[V];
    load_values(norm[kScale] + at.channel, scale);
    load_values(norm[kShift] + at.channel, shift);
    InputRow<T, V> middle, below;
    below.load(x, plan, at, 2 * at.first - 1);
    auto above = row_maximum<T, int>(below, scale, shift, untagged);
    for (int group = at.first; group < at.end; group += kGroup) {
      Vector<T, V> stored[kGroup];
      const int count = min(kGroup, at.end - group);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        const int row = group + i;
        stored[i] = Vector<T, V>::zero();
        if (row >= at.end) continue;
        middle.load(x, plan, at, 2 * row);
        below.load(x, plan, at, 2 * row + 1);
        auto window = row_maximum<T, int>(middle, scale, shift, untagged);
        const auto next = row_maximum<T, int>(below, scale, shift, untagged);
#pragma unroll
        for (int v = 0; v < V; ++v) {
          window.offer(v, above.value[v], 0);
          window.offer(v, next.value[v], 0);
        }
        above = next;
        stored[i] = pack<T, V>(window.value);
        const int64_t pixel = (at.image * plan.out_height + row) * plan.out_width + at.column;
        store_vector(y[pixel] + at.channel, stored[i]);
      }
      if (partials) MergeMoments::merge(pairs, moments_of(stored, count));
    }
  }
  if (partials) block_merge<MergeMoments>(plan.columns, at.at, pairs, partials);
}

template <typename A>
__global__ void __launch_bounds__(kMomentThreads)
    stem_forward_finish_kernel(MomentPartials<A> args) {
  finish_moments(args);
}

void stem_forward(Tensor x, Tensor norm, Tensor y, OptionalTensor stats) {
  const arguments::StemForward call(x, norm, y, stats);
  check_two_dimensional(call);
  if (call.C == 0) return;
  const Launcher launcher(call.lead);
  dispatch_activation(x.scalar_type(), [&]<typename T>(T) {
    using A = Arithmetic<T>;
    if (call.N * call.H * call.W == 0) {
      if (stats) clear_table(launcher, output_rows<A>(call.stats), kStatsRows, call.C);
      return;
    }
    const tiling::StemForward tiling(call.N, call.H, call.W, call.C, sizeof(T),
                                     row_alignment({call.x, call.y}), stats.has_value());
    const StemTiling& plan = tiling.tiling;
    const Workspace partials(x, tiling.bytes);
    dispatch_width<StemTiling::max_vector(sizeof(T))>(plan.columns.vector, [&]<int V>() {
      launcher.launch<&stem_forward_kernel<T, V>>(
          {.grid_x = plan.parts(),
           .grid_y = plan.columns.groups,
           .block = kColumnThreads,
           .shared_bytes = stats ? kMergeBytes<MergeMoments, A, V> : 0},
          input_rows<T>(call.x), input_rows<A>(call.norm), output_rows<T>(call.y), plan,
          partials.data<A>());
    });
    launch_finish<&stem_forward_finish_kernel<A>>(launcher, partials.data<const A>(), plan.parts(),
                                                  call.C, call.stats);
  });
}

}  // namespace
}  // namespace densenet_efficient

DE_REGISTER(library) { library.impl("stem_forward", TORCH_BOX(&densenet_efficient::stem_forward)); }
