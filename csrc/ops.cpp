// Every operator's schema, on one page.
//
// Conventions
//   rows       a pixel is a row: [M, C] with M = N * H * W. Row tensors are channels last: the last
//              stride is 1 and the row stride may exceed C, so a tensor may be a channel slice of a
//              larger feature buffer. Images are [N, H, W, C] likewise; on the CPU they may also
//              have one or three spatial dimensions, and kernels and windows as many: then read
//              3x3 as 3 or 3x3x3.
//   norm       [5, C]: scale a = gamma * rstd, shift s = beta - mean * a, mean, rstd, beta.
//              A normalised value is a * x + s, on the CPU computed as (x - mean) * a + beta;
//              x_hat is (x - mean) * rstd.
//   stats      [2, C]: mean and biased variance over the rows, of the values as stored.
//   dnorm      [2, C]: dgamma = sum dz * x_hat and dbeta = sum dz over the rows.
//   correction [4, C]: a, p, q, mean. The gradient through a norm is a * dz - p - (x - mean) * q.
//   dz         the gradient after the ReLU mask and before the norm's scale.
// Activations are float64, float32, bfloat16 or float16, weights have the activations' dtype. norm,
// stats, dnorm, correction and weight gradients are float32 (float64 with float64 activations).
// On CUDA the convolutions and transitions multiply float32 in TF32 and take no float64: where they
// may be used is densenet_efficient/ops/dispatch.py's to say.
// Kernels write only into the tensors marked with "!", which share no element with another argument
// (overlap.h) and are no negative views (ops/compiled.py). Every argument is checked before that.
#include "stable.h"

STABLE_TORCH_LIBRARY(densenet_efficient, library) {
  // stats of x [M, C].
  library.def("channel_stats(Tensor x, Tensor(a!) stats) -> ()");

  // norm from stats; gamma and beta [C] or None (1 and 0).
  library.def(
      "norm_fold(Tensor stats, Tensor? gamma, Tensor? beta, float eps, Tensor(a!) norm) -> ()");

  // Several norms, one after the other in norms, each in the whole fours of elements that its
  // [5, C_i] take: norm i from the columns of table [2, C] from first[i] on, gammas[i] and betas[i]
  // [C_i]. CPU only.
  library.def(
      "norm_fold_all(Tensor table, Tensor[] gammas, Tensor[] betas, int[] first, float eps, "
      "Tensor(a!) norms) -> ()");

  // correction from dnorm, for statistics taken over `count` rows (0: constants, p = q = 0).
  // accumulate: adds p and q to the first C columns of a shared correction [4, C_total] instead.
  library.def(
      "norm_correction(Tensor dnorm, Tensor norm, int count, bool accumulate, "
      "Tensor(a!) correction) -> ()");

  // dx [M, C] := a * dx - p - (x - mean) * q, in place; 16-bit values by dithered rounding.
  library.def("norm_correction_apply(Tensor(a!) dx, Tensor x, Tensor correction) -> ()");

  // y [M, K] = relu(a * x + s) @ weight^T, x [M, C], weight [K, C]; optionally the stats of y. Then
  // optionally a norm that reads y, as norm_fold gives it: next_stats [2, C_next], of which stats
  // is some columns, holds the statistics of all that it reads.
  library.def(
      "norm_relu_conv1x1_forward(Tensor x, Tensor norm, Tensor weight, Tensor(a!) y, "
      "Tensor(b!)? stats, Tensor? next_stats=None, Tensor? next_gamma=None, "
      "Tensor? next_beta=None, float next_eps=0., Tensor(c!)? next_norm=None) -> ()");

  // dz_y [M, K] is the masked gradient of the norm that follows y; its correction [4, K] gives
  // dy = a * dz_y - p - (y - mean) * q. Then dz = (dy @ weight) * [a * x + s > 0], and
  // dx [M, C] += a * dz, dweight [K, C] = dy^T @ relu(a * x + s), dnorm [2, C] of dz. Then, where
  // x_correction is given, norm_correction of dnorm, accumulated.
  library.def(
      "norm_relu_conv1x1_backward(Tensor dz_y, Tensor y, Tensor correction, Tensor x, Tensor norm, "
      "Tensor weight, Tensor(a!) dx, Tensor(b!)? dweight, Tensor(c!) dnorm, int count=0, "
      "Tensor(d!)? x_correction=None) -> ()");

  // y [N, H, W, K] = conv3x3(relu(a * x + s), weight), padding 1 (zero after the ReLU), stride 1;
  // x [N, H, W, C], weight [K, C, 3, 3] in any dense layout; optionally the stats of y, and a norm
  // that reads y, as in norm_relu_conv1x1_forward.
  library.def(
      "norm_relu_conv3x3_forward(Tensor x, Tensor norm, Tensor weight, Tensor(a!) y, "
      "Tensor(b!)? stats, Tensor? next_stats=None, Tensor? next_gamma=None, "
      "Tensor? next_beta=None, float next_eps=0., Tensor(c!)? next_norm=None) -> ()");

  // dy := a * dy - p - (y - mean) * q first, where y and correction [4, K] are given (dy itself is
  // not written). dz = conv3x3^T(dy, weight) * [a * x + s > 0]. dx = dz, or, with accumulate,
  // dx += a * dz. dweight [K, C, 3, 3] (contiguous or channels last), dnorm [2, C] of dz. Then,
  // where x_correction is given, norm_correction of dnorm, with the same accumulate.
  library.def(
      "norm_relu_conv3x3_backward(Tensor dy, Tensor? y, Tensor? correction, Tensor x, Tensor norm, "
      "Tensor weight, bool accumulate, Tensor(a!) dx, Tensor(b!)? dweight, Tensor(c!) dnorm, "
      "int count=0, Tensor(d!)? x_correction=None) -> ()");

  // y [N, H/2, W/2, K] = avg_pool2x2(relu(a * x + s)) @ weight^T (the pooling commutes with the 1x1
  // convolution; odd edges are dropped); optionally the stats of y.
  library.def(
      "transition_forward(Tensor x, Tensor norm, Tensor weight, Tensor(a!) y, "
      "Tensor(b!)? stats) -> ()");

  // dy [N, H/2, W/2, K]. dx [N, H, W, C] is written whole: through the pooling, the ReLU and the
  // norm, whose statistics were taken over `count` rows (0: constant statistics).
  library.def(
      "transition_backward(Tensor dy, Tensor x, Tensor norm, Tensor weight, int count, "
      "Tensor(a!) dx, Tensor(b!)? dweight, Tensor(c!) dnorm) -> ()");

  // y [N, ceil(H/2), ceil(W/2), C] = max_pool(relu(a * x + s), kernel 3, stride 2, padding 1);
  // optionally the stats of y.
  library.def("stem_forward(Tensor x, Tensor norm, Tensor(a!) y, Tensor(b!)? stats) -> ()");

  // dx [N, H, W, C] is written whole; the first maximum of a window (row-major) takes its gradient.
  library.def(
      "stem_backward(Tensor dy, Tensor x, Tensor norm, int count, Tensor(a!) dx, "
      "Tensor(b!) dnorm) -> ()");

  // y [N, ceil(H/2), ceil(W/2), K] = conv7x7(x, weight), padding 3, stride 2, of x [N, H, W, C] in
  // any layout, C at most 4, and weight [K, C, 7, 7] in any layout. y decides about the dtype,
  // bfloat16 or float16; x and weight have it as well or are float32, and rounded. CUDA only.
  library.def("stem_conv_forward(Tensor x, Tensor weight, Tensor(a!) y) -> ()");

  // dweight [K, C, 7, 7] (float32, contiguous or channels last) of dy [N, ceil(H/2), ceil(W/2), K]
  // and x as in stem_conv_forward; dy decides about the dtype. CUDA only.
  library.def("stem_conv_backward_weight(Tensor dy, Tensor x, Tensor(a!) dweight) -> ()");

  // Several norms' running statistics, after a step. Of norm i, mean and variance [C_i] are mixed
  // with those in the columns of table [2, C] from first[i] on, `momentum` of the new ones and the
  // rest of the old, the variance times `unbiased`; batches (int64, one value) counts one more.
  library.def(
      "running_update(Tensor table, Tensor(a!)[] means, Tensor(b!)[] variances, "
      "Tensor(c!)[] batches, int[] first, float momentum, float unbiased) -> ()");
}
