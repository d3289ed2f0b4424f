// norm_fold: norm [4, C] (scale, shift, mean, rstd) from stats [2, C], gamma and beta [C].
//
//   rstd = 1 / sqrt(var + eps), scale = gamma * rstd, shift = beta - mean * scale
//
// C elements only: one thread, in double, rounded once.
#include <cmath>

#include "rows.h"

namespace densenet_efficient::cpu {
namespace {

template <typename A>
void run(Rows<const A> stats, const A* gamma, const A* beta, double eps, int64_t channels,
         Rows<A> norm) {
  for (int64_t c = 0; c < channels; ++c) {
    const double mean = stats[kStatsMean][c];
    const double rstd = 1.0 / std::sqrt(static_cast<double>(stats[kStatsVar][c]) + eps);
    const double scale = (gamma ? static_cast<double>(gamma[c]) : 1.0) * rstd;
    norm[kScale][c] = static_cast<A>(scale);
    norm[kShift][c] = static_cast<A>((beta ? static_cast<double>(beta[c]) : 0.0) - mean * scale);
    norm[kMean][c] = stats[kStatsMean][c];
    norm[kRstd][c] = static_cast<A>(rstd);
  }
}

template <typename A>
const A* vector_data(const OptionalTensor& tensor) {
  return tensor ? static_cast<const A*>(tensor->const_data_ptr()) : nullptr;
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
  if (dtype == ScalarType::Double)
    run<double>(input_rows<double>(stats, stats_stride), vector_data<double>(gamma),
                vector_data<double>(beta), eps, channels, output_rows<double>(norm, norm_stride));
  else
    run<float>(input_rows<float>(stats, stats_stride), vector_data<float>(gamma),
               vector_data<float>(beta), eps, channels, output_rows<float>(norm, norm_stride));
}

}  // namespace
}  // namespace densenet_efficient::cpu

STABLE_TORCH_LIBRARY_IMPL(densenet_efficient, CPU, library) {
  library.impl("norm_fold", TORCH_BOX(&densenet_efficient::cpu::norm_fold));
}
