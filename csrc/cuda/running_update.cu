// running_update: the running statistics of several norms, after a step.
//
//   mean := (1 - momentum) * mean + momentum * batch mean, the variance likewise, times `unbiased`
//
// One thread per channel of each norm, in double, rounded once (norm_relu.h). A launch takes as
// many norms as its parameters hold. Bytes moved: the moments twice, the table's columns once a
// norm.
#include <algorithm>

#include "launch.h"

namespace densenet_efficient {
namespace {

constexpr int kThreads = 128, kNorms = 64;

template <typename A>
struct RunningNorms {
  struct {
    A *mean, *variance;
    int64_t* batches;
    int first, channels;
  } norms[kNorms];
};

template <typename A>
__global__ void __launch_bounds__(kThreads)
    running_update_kernel(RunningNorms<A> args, Rows<const A> table, double momentum,
                          double unbiased) {
  using namespace device;
  const auto& norm = args.norms[block_y()];
  const int c = block_x() * kThreads + thread_index();
  if (c == 0) global_store(norm.batches, global_load<int64_t>(norm.batches) + 1);
  if (c >= norm.channels) return;
  const int column = norm.first + c;
  global_store(norm.mean + c,
               mixed_statistic(global_load<A>(norm.mean + c),
                               global_load<A>(table[kStatsMean] + column), momentum, 1.0));
  global_store(norm.variance + c,
               mixed_statistic(global_load<A>(norm.variance + c),
                               global_load<A>(table[kStatsVar] + column), momentum, unbiased));
}

void running_update(Tensor table, std::vector<Tensor> means, std::vector<Tensor> variances,
                    std::vector<Tensor> batches, std::vector<int64_t> first, double momentum,
                    double unbiased) {
  const arguments::RunningUpdate call(table, means, variances, batches, first);
  const Launcher launcher(call.lead);
  dispatch_arithmetic(call.arithmetic, [&]<typename A>(A) {
    for (size_t begin = 0; begin < call.norms.size(); begin += kNorms) {
      const size_t count = std::min<size_t>(kNorms, call.norms.size() - begin);
      RunningNorms<A> args{};
      int64_t widest = 1;
      for (size_t i = 0; i < count; ++i) {
        const auto& norm = call.norms[begin + i];
        args.norms[i] = {output_rows<A>(norm.mean).data, output_rows<A>(norm.variance).data,
                         static_cast<int64_t*>(norm.batches->mutable_data_ptr()),
                         static_cast<int>(norm.first), static_cast<int>(norm.mean.channels)};
        widest = std::max(widest, norm.mean.channels);
      }
      launcher.launch<&running_update_kernel<A>>({.grid_x = ceil_div(widest, kThreads),
                                                  .grid_y = static_cast<int64_t>(count),
                                                  .block = kThreads},
                                                 args, input_rows<A>(call.table), momentum,
                                                 unbiased);
    }
  });
}

}  // namespace
}  // namespace densenet_efficient

DE_REGISTER(library) {
  library.impl("running_update", TORCH_BOX(&densenet_efficient::running_update));
}
