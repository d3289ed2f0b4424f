// running_update: the running statistics of several norms, after a step.
//
//   mean := (1 - momentum) * mean + momentum * batch mean, the variance likewise, times `unbiased`
//
// In double, rounded once (norm_relu.h). Nothing is written before all arguments are checked, and
// nothing fails after that: all norms are updated or none.
#include "rows/operands.h"

namespace densenet_efficient::cpu {
namespace {

template <typename A>
void mix(A* running, const A* batch, int64_t channels, double momentum, double factor) {
  for (int64_t c = 0; c < channels; ++c)
    running[c] = mixed_statistic(running[c], batch[c], momentum, factor);
}

void running_update(Tensor table, std::vector<Tensor> means, std::vector<Tensor> variances,
                    std::vector<Tensor> batches, std::vector<int64_t> first, double momentum,
                    double unbiased) {
  const arguments::RunningUpdate call(table, means, variances, batches, first);
  dispatch_arithmetic(call.arithmetic, [&]<typename A>(A) {
    const Rows<const A> stats = input_rows<A>(call.table);
    for (const auto& norm : call.norms) {
      const int64_t channels = norm.mean.channels;
      mix(output_rows<A>(norm.mean).data, stats[kStatsMean] + norm.first, channels, momentum, 1.0);
      mix(output_rows<A>(norm.variance).data, stats[kStatsVar] + norm.first, channels, momentum,
          unbiased);
      ++*static_cast<int64_t*>(norm.batches->mutable_data_ptr());
    }
  });
}

}  // namespace
}  // namespace densenet_efficient::cpu

STABLE_TORCH_LIBRARY_IMPL(densenet_efficient, CPU, library) {
  library.impl("running_update", TORCH_BOX(&densenet_efficient::cpu::running_update));
}
