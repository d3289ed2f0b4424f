// norm_fold: norm [4, C] (scale, shift, mean, rstd) from stats [2, C], gamma and beta [C].
//
//   rstd = 1 / sqrt(var + eps), scale = gamma * rstd, shift = beta - mean * scale
//
// One thread per channel, in double, rounded once. Bytes moved: the tables, once.
#include <cmath>

#include "launch.h"

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
  const A mean = global_load<A>(stats[kStatsMean] + c);
  const double variance = global_load<A>(stats[kStatsVar] + c);
  const double rstd = 1.0 / sqrt(variance + eps);
  const double scale = (gamma ? double(global_load<A>(gamma + c)) : 1.0) * rstd;
  const double shift = (beta ? double(global_load<A>(beta + c)) : 0.0) - double(mean) * scale;
  global_store(norm[kScale] + c, A(scale));
  global_store(norm[kShift] + c, A(shift));
  global_store(norm[kMean] + c, mean);
  global_store(norm[kRstd] + c, A(rstd));
}

void norm_fold(Tensor stats, OptionalTensor gamma, OptionalTensor beta, double eps, Tensor norm) {
  const char* op = "norm_fold";
  check_dim({op, "stats", stats}, 2);
  const int64_t channels = stats.size(1);
  const ScalarType dtype = stats.scalar_type();
  if (dtype != ScalarType::Double) check_dtype({op, "stats", stats}, ScalarType::Float);
  const int64_t stats_stride =
      check_table({op, "stats", stats}, kStatsRows, channels, dtype, stats, "stats");
  const auto check_vector = [&](const char* name, const OptionalTensor& tensor) {
    if (!tensor) return;
    check_shape({op, name, *tensor}, {channels});
    check_dtype({op, name, *tensor}, dtype);
    check_device({op, name, *tensor}, stats, "stats");
    check_contiguous({op, name, *tensor});
  };
  check_vector("gamma", gamma);
  check_vector("beta", beta);
  const int64_t norm_stride =
      check_table({op, "norm", norm}, kNormRows, channels, dtype, stats, "stats");
  if (channels == 0) return;
  const Launcher launcher(op, stats);
  dispatch_arithmetic(dtype, [&]<typename A>(A) {
    const auto data = [](const OptionalTensor& tensor) {
      return tensor ? static_cast<const A*>(tensor->const_data_ptr()) : nullptr;
    };
    launcher.launch<&norm_fold_kernel<A>>(
        {.grid_x = ceil_div(channels, kThreads), .block = kThreads},
        input_rows<A>(stats, stats_stride), data(gamma), data(beta), eps,
        static_cast<int>(channels), output_rows<A>(norm, norm_stride));
  });
}

}  // namespace
}  // namespace densenet_efficient

DE_REGISTER(library) { library.impl("norm_fold", TORCH_BOX(&densenet_efficient::norm_fold)); }
