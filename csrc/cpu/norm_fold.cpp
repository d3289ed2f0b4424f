// norm_fold: norm [5, C] (scale, shift, mean, rstd, beta) from stats [2, C], gamma and beta [C].
//
//   rstd = 1 / sqrt(var + eps), scale = gamma * rstd, shift = beta - mean * scale
//
// C elements only: one thread, in double, rounded once. The shift belongs to the scale as rounded:
// where the mean is large next to the deviation, mean * scale cancels what x * scale makes.
#include <cmath>

#include "rows/operands.h"

namespace densenet_efficient::cpu {
namespace {

template <typename A>
void run(Rows<const A> stats, const A* gamma, const A* beta, double eps, int64_t channels,
         Rows<A> norm) {
  for (int64_t c = 0; c < channels; ++c) {
    const double mean = stats[kStatsMean][c];
    const double rstd = 1.0 / std::sqrt(static_cast<double>(stats[kStatsVar][c]) + eps);
    const A scale = static_cast<A>((gamma ? static_cast<double>(gamma[c]) : 1.0) * rstd);
    const A offset = beta ? beta[c] : A(0);
    norm[kScale][c] = scale;
    norm[kShift][c] =
        static_cast<A>(static_cast<double>(offset) - mean * static_cast<double>(scale));
    norm[kMean][c] = stats[kStatsMean][c];
    norm[kRstd][c] = static_cast<A>(rstd);
    norm[kBeta][c] = offset;
  }
}

void norm_fold(Tensor stats, OptionalTensor gamma, OptionalTensor beta, double eps, Tensor norm) {
  const arguments::NormFold call(stats, gamma, beta, norm);
  dispatch_arithmetic(call.arithmetic, [&]<typename A>(A) {
    run<A>(input_rows<A>(call.stats), input_rows<A>(call.gamma).data, input_rows<A>(call.beta).data,
           eps, call.C, output_rows<A>(call.norm));
  });
}

}  // namespace
}  // namespace densenet_efficient::cpu

STABLE_TORCH_LIBRARY_IMPL(densenet_efficient, CPU, library) {
  library.impl("norm_fold", TORCH_BOX(&densenet_efficient::cpu::norm_fold));
}
