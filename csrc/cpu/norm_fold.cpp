// norm_fold: norm [5, C] (scale, shift, mean, rstd, beta) from stats [2, C], gamma and beta [C].
// norm_fold_all: several at a time.
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

void norm_fold_all(Tensor table, std::vector<Tensor> gammas, std::vector<Tensor> betas,
                   std::vector<int64_t> first, double eps, Tensor norms) {
  const arguments::NormFoldAll call(table, gammas, betas, first, norms);
  dispatch_arithmetic(call.arithmetic, [&]<typename A>(A) {
    const Rows<const A> stats = input_rows<A>(call.table);
    A* const folded = output_rows<A>(call.norms).data;
    for (const auto& norm : call.each) {
      const int64_t channels = norm.gamma.channels;
      fold_norm<A>({stats.data + norm.first, stats.stride}, input_rows<A>(norm.gamma).data,
                   input_rows<A>(norm.beta).data, eps, channels, {folded + norm.place, channels});
    }
  });
}

}  // namespace
}  // namespace densenet_efficient::cpu

STABLE_TORCH_LIBRARY_IMPL(densenet_efficient, CPU, library) {
  library.impl("norm_fold", TORCH_BOX(&densenet_efficient::cpu::norm_fold));
  library.impl("norm_fold_all", TORCH_BOX(&densenet_efficient::cpu::norm_fold_all));
}
