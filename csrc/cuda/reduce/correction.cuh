// The deferred part of a norm's gradient, straight from the sums: p = scale * dbeta / count and
// q = scale * rstd * dgamma / count, both 0 for constant statistics (count 0).
#pragma once

#include "../launch.h"
#include "../vector.cuh"

namespace densenet_efficient {

// V channels' worth of what turns dz into dx.
template <typename A, int V>
struct Correction {
  A a[V], p[V], q[V], mean[V];

  __device__ __forceinline__ Correction(const Rows<const A>& norm, const Rows<const A>& dnorm,
                                        int64_t count, int channel) {
    load_values(norm[kScale] + channel, a);
    load_values(norm[kMean] + channel, mean);
    load_values(norm[kRstd] + channel, q);
    A dgamma[V];
    load_values(dnorm[kDgamma] + channel, dgamma);
    load_values(dnorm[kDbeta] + channel, p);
    const A share = count > 0 ? A(1) / A(count) : A(0);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      p[v] = count > 0 ? a[v] * p[v] * share : A(0);
      q[v] = count > 0 ? a[v] * q[v] * dgamma[v] * share : A(0);
    }
  }

  __device__ __forceinline__ A apply(A dz, A x, int v) const {
    return correct(dz, x, a[v], p[v], q[v], mean[v]);
  }
};

}  // namespace densenet_efficient
