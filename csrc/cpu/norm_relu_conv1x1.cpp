// norm_relu_conv1x1: y [M, K] = relu(a * x + s) @ weight^T and its gradients.
//
// Forward: gemm/forward.h over rows of x [M, C]; moves M * (C + K) elements.
// Backward: gemm/backward.h; for each block of columns of a row tile
//   dz = (dy @ weight) * [a * x + s > 0], dx += a * dz, sums of dz and dz * (x - mean)
//   dweight += dy^T @ relu(a * x + s)
// dy = a_y * dz_y - p - (y - mean) * q is made per tile from dz_y and y [M, K]. x and dx are read
// once, dx is written once: M * (2 K + 3 C) elements.
#include "gemm/backward.h"
#include "gemm/forward.h"
#include "rows/epilogue.h"

namespace densenet_efficient::cpu {
namespace {

template <typename T>
void forward(const arguments::NormReluConv1x1Forward& call) {
  using A = Arithmetic<T>;
  const int64_t C = call.C, padded = round_up(C, kGroup<T>);
  const auto x = input_rows<T>(call.x);
  const auto norm = input_rows<A>(call.norm);
  product_forward<T>(call.weight, call.M, output_rows<T>(call.y), output_rows<A>(call.stats),
                     [=](int64_t row, Element<T>* out) {
                       prefetch_row(x[row + 8], C);
                       norm_relu_row<T>(x[row], norm, C, padded, out);
                     });
}

void norm_relu_conv1x1_forward(Tensor x, Tensor norm, Tensor weight, Tensor y, OptionalTensor stats,
                               OptionalTensor next_stats, OptionalTensor next_gamma,
                               OptionalTensor next_beta, double next_eps,
                               OptionalTensor next_norm) {
  const arguments::NormReluConv1x1Forward call(
      x, norm, weight, y, stats, {next_stats, next_gamma, next_beta, next_eps, next_norm});
  dispatch_activation(x.scalar_type(), [&]<typename T>(T) {
    forward<T>(call);
    fold_next<Arithmetic<T>>(call.next);
  });
}

template <typename T>
void backward(const arguments::NormReluConv1x1Backward& call) {
  using A = Arithmetic<T>;
  const int64_t K = call.K, padded = round_up(K, kGroup<T>);
  const auto dz_y = input_rows<T>(call.dz_y), y = input_rows<T>(call.y), x = input_rows<T>(call.x);
  const auto correction = input_rows<A>(call.correction), norm = input_rows<A>(call.norm);
  const auto dx = output_rows<T>(call.dx);
  product_backward<T>(
      call.weight, call.M, gradients<A>(call),
      [=](int64_t row, Element<T>* to) { dy_row<T>(dz_y[row], y[row], correction, K, padded, to); },
      [=](const Part& part, const A* dh, A* sums, Unit<T>* h) {
        data_gradient_epilogue<T, Epilogue::kAdd>(
            dh, part.width, {x[part.first_row], x.stride}, norm, part.column, part.columns,
            part.rows, {dx[part.first_row], dx.stride}, sums, sums + tiling::kColumns, h);
      });
}

void norm_relu_conv1x1_backward(Tensor dz_y, Tensor y, Tensor correction, Tensor x, Tensor norm,
                                Tensor weight, Tensor dx, OptionalTensor dweight, Tensor dnorm,
                                int64_t count, OptionalTensor x_correction) {
  const arguments::NormReluConv1x1Backward call(dz_y, y, correction, x, norm, weight, dx, dweight,
                                                dnorm, count, x_correction);
  dispatch_activation(x.scalar_type(), [&]<typename T>(T) {
    backward<T>(call);
    correct_x<Arithmetic<T>>(call, true);
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
