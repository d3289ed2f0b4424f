// norm_fold: norm [5, C] (scale, shift, mean, rstd, beta) from stats [2, C], gamma and beta [C].
//
//   rstd = 1 / sqrt(var + eps), scale = gamma * rstd, shift = beta - mean * scale
//
// One thread per channel, in double, rounded once; the shift belongs to the scale as rounded.
// Bytes moved: the tables, once.
#include "launch.h"
#include "reduce/tables.cuh"

namespace densenet_efficient {
namespace {

constexpr int kThreads = 128;

template <typename A>
__global__ void __launch_bounds__(kThreads)
    norm_fold_kernel(Rows<const A> stats, const A* gamma, const A* beta, double eps, int channels,
                     Rows<A> norm) {
  using namespace device;
  const int c = block_x() * kThreads + thread_index();
  if (c >= channels) return;
  store_fold(norm, c, global_load<A>(stats[kStatsMean] + c), global_load<A>(stats[kStatsVar] + c),
             gamma, beta, eps);
}

void norm_fold(Tensor stats, OptionalTensor gamma, OptionalTensor beta, double eps, Tensor norm) {
  const arguments::NormFold call(stats, gamma, beta, norm);
  if (call.C == 0) return;
  const Launcher launcher(call.lead);
  dispatch_arithmetic(call.arithmetic, [&]<typename A>(A) {
    launcher.launch<&norm_fold_kernel<A>>({.grid_x = ceil_div(call.C, kThreads), .block = kThreads},
                                          input_rows<A>(call.stats), input_rows<A>(call.gamma).data,
                                          input_rows<A>(call.beta).data, eps,
                                          static_cast<int>(call.C), output_rows<A>(call.norm));
  });
}

}  // namespace
}  // namespace densenet_efficient

DE_REGISTER(library) { library.impl("norm_fold", TORCH_BOX(&densenet_efficient::norm_fold)); }
