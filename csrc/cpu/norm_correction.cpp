// norm_correction: the deferred part of a norm's gradient, as per-channel vectors; and its use.
//
//   p = scale * dbeta / count, q = scale * rstd * dgamma / count    (0 for constant statistics)
//   dx = a * dx - p - (x - mean) * q                                 (norm_correction_apply)
//
// norm_correction handles C elements on one thread, in double. norm_correction_apply reads and
// writes dx and reads x once, rows shared out among the threads; 16-bit results are dithered.
#include "../dither.h"
#include "parallel.h"
#include "rows/operands.h"
#include "rows/tables.h"

namespace densenet_efficient::cpu {
namespace {

void norm_correction(Tensor dnorm, Tensor norm, int64_t count, bool accumulate, Tensor correction) {
  const arguments::NormCorrection call(dnorm, norm, count, accumulate, correction);
  dispatch_arithmetic(call.arithmetic, [&]<typename A>(A) {
    put_correction<A>(input_rows<A>(call.dnorm), input_rows<A>(call.norm), call.count, accumulate,
                      call.C, output_rows<A>(call.correction));
  });
}

// index: of the row's first element in the whole tensor, for the noise.
template <typename T>
void apply_row(T* __restrict dx, const T* __restrict x, Rows<const Arithmetic<T>> correction,
               int64_t channels, uint32_t index) {
  const Arithmetic<T>* __restrict a = correction[kA];
  const Arithmetic<T>* __restrict p = correction[kP];
  const Arithmetic<T>* __restrict q = correction[kQ];
  const Arithmetic<T>* __restrict mean = correction[kCenter];
  for (int64_t c = 0; c < channels; ++c)
    dx[c] = store<T>(dithered_as<T>(correct(load(dx[c]), load(x[c]), a[c], p[c], q[c], mean[c]),
                                    index + static_cast<uint32_t>(c)));
}

template <typename T>
void apply(Rows<T> dx, Rows<const T> x, Rows<const Arithmetic<T>> correction, int64_t rows,
           int64_t channels) {
  constexpr int64_t kRows = 64;
  parallel(ceil_div(rows, kRows), [&](int64_t task) {
    for (int64_t r = task * kRows; r < std::min(rows, (task + 1) * kRows); ++r)
      apply_row<T>(dx[r], x[r], correction, channels, static_cast<uint32_t>(r * channels));
  });
}

void norm_correction_apply(Tensor dx, Tensor x, Tensor correction) {
  const arguments::NormCorrectionApply call(dx, x, correction);
  dispatch_activation(x.scalar_type(), [&]<typename T>(T) {
    apply<T>(output_rows<T>(call.dx), input_rows<T>(call.x),
             input_rows<Arithmetic<T>>(call.correction), call.M, call.C);
  });
}

}  // namespace
}  // namespace densenet_efficient::cpu

STABLE_TORCH_LIBRARY_IMPL(densenet_efficient, CPU, library) {
  library.impl("norm_correction", TORCH_BOX(&densenet_efficient::cpu::norm_correction));
  library.impl("norm_correction_apply", TORCH_BOX(&densenet_efficient::cpu::norm_correction_apply));
}
