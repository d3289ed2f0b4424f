// norm_correction: the deferred part of a norm's gradient, as per-channel vectors; and its use.
//
//   p = scale * dbeta / count, q = scale * rstd * dgamma / count    (0 for constant statistics)
//   dx = a * dx - p - (x - mean) * q                                 (norm_correction_apply)
//
// norm_correction handles C elements on one thread, in double. norm_correction_apply reads and
// writes dx and reads x once, rows shared out among the threads; 16-bit results are dithered.
#include <vector>

#include "../dither.h"
#include "parallel.h"
#include "rows.h"

namespace densenet_efficient::cpu {
namespace {

template <typename A>
void run(Rows<const A> dnorm, Rows<const A> norm, int64_t count, bool accumulate, int64_t channels,
         Rows<A> correction) {
  if (!accumulate) return make_correction(dnorm, norm, count, channels, correction);
  std::vector<A> own(kCorrectionRows * channels);
  make_correction(dnorm, norm, count, channels, Rows<A>{own.data(), channels});
  for (const auto row : {kP, kQ})
    for (int64_t c = 0; c < channels; ++c) correction[row][c] += own[row * channels + c];
}

void norm_correction(Tensor dnorm, Tensor norm, int64_t count, bool accumulate, Tensor correction) {
  const char* op = "norm_correction";
  check_dim({op, "norm", norm}, 2);
  const int64_t channels = norm.size(1);
  const ScalarType dtype = norm.scalar_type();
  if (dtype != ScalarType::Double) check_dtype({op, "norm", norm}, ScalarType::Float);
  const int64_t norm_stride =
      check_table({op, "norm", norm}, kNormRows, channels, dtype, norm, "norm");
  const int64_t dnorm_stride =
      check_table({op, "dnorm", dnorm}, kDnormRows, channels, dtype, norm, "norm");
  check_dim({op, "correction", correction}, 2);
  const int64_t width = correction.size(1);
  if (accumulate ? width < channels : width != channels)
    fail({op, "correction", correction}, "must have ", accumulate ? "at least " : "", channels,
         " columns, got ", width);
  const int64_t correction_stride =
      check_table({op, "correction", correction}, kCorrectionRows, width, dtype, norm, "norm");
  if (count < 0) fail({op, "count", norm}, "must not be negative, got ", count);
  if (dtype == ScalarType::Double)
    run<double>(input_rows<double>(dnorm, dnorm_stride), input_rows<double>(norm, norm_stride),
                count, accumulate, channels, output_rows<double>(correction, correction_stride));
  else
    run<float>(input_rows<float>(dnorm, dnorm_stride), input_rows<float>(norm, norm_stride), count,
               accumulate, channels, output_rows<float>(correction, correction_stride));
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
  const char* op = "norm_correction_apply";
  check_dim({op, "x", x}, 2);
  const int64_t rows = x.size(0), channels = x.size(1);
  const ScalarType accumulate = check_activation_dtype({op, "x", x});
  const int64_t x_stride = check_rows({op, "x", x});
  const int64_t dx_stride = check_activation({op, "dx", dx}, {rows, channels}, x, "x");
  const int64_t stride =
      check_table({op, "correction", correction}, kCorrectionRows, channels, accumulate, x, "x");
  DE_DISPATCH(x.scalar_type(), T,
              apply<T>(output_rows<T>(dx, dx_stride), input_rows<T>(x, x_stride),
                       input_rows<Arithmetic<T>>(correction, stride), rows, channels));
}

}  // namespace
}  // namespace densenet_efficient::cpu

STABLE_TORCH_LIBRARY_IMPL(densenet_efficient, CPU, library) {
  library.impl("norm_correction", TORCH_BOX(&densenet_efficient::cpu::norm_correction));
  library.impl("norm_correction_apply", TORCH_BOX(&densenet_efficient::cpu::norm_correction_apply));
}
