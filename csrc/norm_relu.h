// Batch normalisation and ReLU on one value, and their gradients: every formula that the kernels
// share, once, for the host and the device. A is the arithmetic type: float, or double for float64.
#pragma once

#include <cmath>

#if defined(__CUDACC__)
#define DE_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define DE_HOST_DEVICE inline
#endif

namespace densenet_efficient {

// Rows of the tensors `norm` [5, C], `correction` [4, C], `stats` and `dnorm` [2, C].
enum NormRow { kScale = 0, kShift = 1, kMean = 2, kRstd = 3, kBeta = 4, kNormRows = 5 };
enum CorrectionRow { kA = 0, kP = 1, kQ = 2, kCenter = 3, kCorrectionRows = 4 };
enum StatsRow { kStatsMean = 0, kStatsVar = 1, kStatsRows = 2 };
enum DnormRow { kDgamma = 0, kDbeta = 1, kDnormRows = 2 };

// The norm's value before the ReLU. A channel whose mean is large next to its deviation keeps its
// digits, and a constant one is exactly beta.
template <typename A>
DE_HOST_DEVICE A normalise(A x, A scale, A mean, A beta) {
  return (x - mean) * scale + beta;
}

// The same in one fused multiply-add, with shift = beta - mean * scale: in the CUDA kernels, where
// an instruction a value counts. Forward and backward of a layer use the same one of the two, so
// that both see the same sign and the mask is exactly the forward's.
template <typename A>
DE_HOST_DEVICE A normalise(A x, A scale, A shift) {
  return x * scale + shift;
}

// A NaN passes, as it does in PyTorch's ReLU.
template <typename A>
DE_HOST_DEVICE A relu(A z) {
  return z < A(0) ? A(0) : z;
}

template <typename A>
DE_HOST_DEVICE A norm_relu(A x, A scale, A shift) {
  return relu(normalise(x, scale, shift));
}

// Whether the ReLU is inactive there: no gradient goes through. A NaN's does.
template <typename A>
DE_HOST_DEVICE bool relu_blocks(A z) {
  return z <= A(0);
}

// dz: the gradient through the ReLU, zero where the ReLU is inactive; a NaN passes here too.
template <typename A>
DE_HOST_DEVICE A relu_mask(A dh, A z) {
  return relu_blocks(z) ? A(0) : dh;
}

// The gradient through the norm and its batch statistics.
template <typename A>
DE_HOST_DEVICE A correct(A dz, A x, A a, A p, A q, A mean) {
  return a * dz - p - (x - mean) * q;
}

// A norm from its channel's statistics, in double, rounded once. The shift belongs to the scale as
// rounded: where the mean is large next to the deviation, mean * scale cancels what x * scale
// makes.
template <typename A>
struct FoldedNorm {
  A scale, shift, mean, rstd, beta;
};

template <typename A>
DE_HOST_DEVICE FoldedNorm<A> fold(A mean, A variance, A gamma, A beta, double eps) {
  const double rstd = 1.0 / sqrt(double(variance) + eps);
  const A scale = A(double(gamma) * rstd);
  return {scale, A(double(beta) - double(mean) * double(scale)), mean, A(rstd), beta};
}

// What a running statistic becomes with a batch's; factor: of the batch's, which is 1 for a mean.
template <typename A>
DE_HOST_DEVICE A mixed_statistic(A running, A batch, double momentum, double factor) {
  return A(fma(momentum * factor, double(batch), (1.0 - momentum) * double(running)));
}

// (count, mean, M2): a running mean and sum of squared deviations, merged by Chan's formula.
// Merging in a fixed order gives the same bits on every run; no difference of large sums appears.
template <typename A>
struct Moments {
  A count, mean, m2;
};

template <typename A>
DE_HOST_DEVICE Moments<A> merge(Moments<A> left, Moments<A> right) {
  const A count = left.count + right.count;
  if (count == A(0)) return Moments<A>{A(0), A(0), A(0)};
  const A delta = right.mean - left.mean;
  const A share = right.count / count;
  return Moments<A>{count, left.mean + delta * share,
                    left.m2 + right.m2 + delta * delta * left.count * share};
}

}  // namespace densenet_efficient
