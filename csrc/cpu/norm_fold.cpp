// norm_fold: norm [5, C] (scale, shift, mean, rstd, beta) from stats [2, C], gamma and beta [C].
//
//   rstd = 1 / sqrt(var + eps), scale = gamma * rstd, shift = beta - mean * scale
//
// C elements only: one thread (norm_relu.h has the formula, rows/tables.h the loop).
#include "rows/operands.h"
#include "rows/tables.h"

namespace densenet_efficient::cpu {
namespace {

void norm_fold(Tensor stats, OptionalTensor gamma, OptionalTensor beta, double eps, Tensor norm) {
  const arguments::NormFold call(stats, gamma, beta, norm);
  dispatch_arithmetic(call.arithmetic, [&]<typename A>(A) {
    fold_norm<A>(input_rows<A>(call.stats), input_rows<A>(call.gamma).data,
                 input_rows<A>(call.beta).data, eps, call.C, output_rows<A>(call.norm));
  });
}

}  // namespace
}  // namespace densenet_efficient::cpu

STABLE_TORCH_LIBRARY_IMPL(densenet_efficient, CPU, library) {
  library.impl("norm_fold", TORCH_BOX(&densenet_efficient::cpu::norm_fold));
}
