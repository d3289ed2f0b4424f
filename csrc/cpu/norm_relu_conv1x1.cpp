// norm_relu_conv1x1: y [M, K] = relu(a * x + s) @ weight^T and its gradients.
//
// Forward: product_forward.h over rows of x [M, C]; moves M * (C + K) elements.
// Backward: product_backward.h; for each block of columns of a row tile
//   dz = (dy @ weight) * [a * x + s > 0], dx += a * dz, sums of dz and dz * (x - mean)
//   dweight += dy^T @ relu(a * x + s)
// dy = a_y * dz_y - p - (y - mean) * q is made per tile from dz_y and y [M, K]. x and dx are read
// once, dx is written once: M * (2 K + 3 C) elements.
#include "product_backward.h"
#include "product_forward.h"

namespace densenet_efficient::cpu {
namespace {

template <typename T>
void forward(const Tensor& x, int64_t x_stride, const Tensor& norm, int64_t norm_stride,
             const Tensor& weight, const Tensor& y, int64_t y_stride, const OptionalTensor& stats,
             int64_t stats_stride) {
  using A = Arithmetic<T>;
  const int64_t C = x.size(1);
  const auto source = input_rows<T>(x, x_stride);
  const auto table = input_rows<A>(norm, norm_stride);
  const A* scale = table[kScale];
  const A* shift = table[kShift];
  std::optional<Rows<A>> stats_rows;
  if (stats) stats_rows = output_rows<A>(*stats, stats_stride);
  const int64_t padded = round_up(C, kGroup<T>);
  product_forward<T>(weight, x.size(0), output_rows<T>(y, y_stride), stats_rows,
                     [=](int64_t row, Element<T>* out) {
                       prefetch_row(source[row + 8], C);
                       norm_relu_row<T>(source[row], scale, shift, C, padded, out);
                     });
}

void norm_relu_conv1x1_forward(Tensor x, Tensor norm, Tensor weight, Tensor y,
                               OptionalTensor stats) {
  const char* op = "norm_relu_conv1x1_forward";
  check_dim({op, "x", x}, 2);
  check_dim({op, "weight", weight}, 2);
  const int64_t M = x.size(0), C = x.size(1), K = weight.size(0);
  const ScalarType accumulate = check_activation_dtype({op, "x", x});
  const int64_t x_stride = check_rows({op, "x", x});
  const int64_t norm_stride = check_table({op, "norm", norm}, kNormRows, C, accumulate, x, "x");
  check_shape({op, "weight", weight}, {K, C});
  check_dtype({op, "weight", weight}, x.scalar_type());
  check_device({op, "weight", weight}, x, "x");
  const int64_t y_stride = check_activation({op, "y", y}, {M, K}, x, "x");
  const int64_t stats_stride =
      stats ? check_table({op, "stats", *stats}, kStatsRows, K, accumulate, x, "x") : 0;
  DE_DISPATCH(x.scalar_type(), T,
              forward<T>(x, x_stride, norm, norm_stride, weight, y, y_stride, stats, stats_stride));
}

template <typename T>
struct Backward {
  Rows<const T> dz_y, y, x;
  Rows<const Arithmetic<T>> correction, norm;
  Rows<T> dx;
  Gradients<Arithmetic<T>> out;

  void run(const Tensor& weight, int64_t M) const {
    using A = Arithmetic<T>;
    const int64_t K = weight.size(0), padded = round_up(K, kGroup<T>);
    product_backward<T>(
        weight, M, out,
        [&](int64_t row, Element<T>* to) {
          dy_row<T>(dz_y[row], y[row], correction, K, padded, to);
        },
        [&](const Part& part, const A* dh, A* sums, Unit<T>* h) {
          take_dh<T, Take::kAdd>(dh, part.width, {x[part.first_row], x.stride}, norm, part.column,
                                 part.columns, part.rows, {dx[part.first_row], dx.stride}, sums,
                                 sums + workspace::cpu::kColumns, h);
        });
  }
};

void norm_relu_conv1x1_backward(Tensor dz_y, Tensor y, Tensor correction, Tensor x, Tensor norm,
                                Tensor weight, Tensor dx, OptionalTensor dweight, Tensor dnorm) {
  const char* op = "norm_relu_conv1x1_backward";
  check_dim({op, "x", x}, 2);
  check_dim({op, "weight", weight}, 2);
  const int64_t M = x.size(0), C = x.size(1), K = weight.size(0);
  const ScalarType accumulate = check_activation_dtype({op, "x", x});
  const int64_t x_stride = check_rows({op, "x", x});
  const int64_t dz_y_stride = check_activation({op, "dz_y", dz_y}, {M, K}, x, "x");
  const int64_t y_stride = check_activation({op, "y", y}, {M, K}, x, "x");
  const int64_t correction_stride =
      check_table({op, "correction", correction}, kCorrectionRows, K, accumulate, x, "x");
  const int64_t norm_stride = check_table({op, "norm", norm}, kNormRows, C, accumulate, x, "x");
  check_shape({op, "weight", weight}, {K, C});
  check_dtype({op, "weight", weight}, x.scalar_type());
  check_device({op, "weight", weight}, x, "x");
  const int64_t dx_stride = check_activation({op, "dx", dx}, {M, C}, x, "x");
  if (dweight) {
    check_table({op, "dweight", *dweight}, K, C, accumulate, x, "x");
    check_contiguous({op, "dweight", *dweight});
  }
  const int64_t dnorm_stride = check_table({op, "dnorm", dnorm}, kDnormRows, C, accumulate, x, "x");
  DE_DISPATCH(x.scalar_type(), T, {
    using A = Arithmetic<T>;
    const auto norm_rows = input_rows<A>(norm, norm_stride);
    Backward<T>{input_rows<T>(dz_y, dz_y_stride),
                input_rows<T>(y, y_stride),
                input_rows<T>(x, x_stride),
                input_rows<A>(correction, correction_stride),
                norm_rows,
                output_rows<T>(dx, dx_stride),
                {dweight ? static_cast<A*>(dweight->mutable_data_ptr()) : nullptr,
                 output_rows<A>(dnorm, dnorm_stride), norm_rows[kRstd]}}
        .run(weight, M);
  });
}

}  // namespace
}  // namespace densenet_efficient::cpu

STABLE_TORCH_LIBRARY_IMPL(densenet_efficient, CPU, library) {
  library.impl("norm_relu_conv1x1_forward",
               TORCH_BOX(&densenet_efficient::cpu::norm_relu_conv1x1_forward));
  library.impl("norm_relu_conv1x1_backward",
               TORCH_BOX(&densenet_efficient::cpu::norm_relu_conv1x1_backward));
}
