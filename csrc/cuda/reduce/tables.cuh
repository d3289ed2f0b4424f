// What becomes of a norm's per-channel tables, one channel at a time: in kernels of their own, and
// where a second pass has just made the values.
#pragma once

#include "../device.cuh"
#include "../launch.h"

namespace densenet_efficient {

// norm [5, C] of one channel; gamma and beta may be null.
template <typename A>
__device__ __forceinline__ void store_fold(Rows<A> norm, int channel, A mean, A variance,
                                           const A* gamma, const A* beta, double eps) {
  using namespace device;
  const auto folded = fold(mean, variance, gamma ? global_load<A>(gamma + channel) : A(1),
                           beta ? global_load<A>(beta + channel) : A(0), eps);
  global_store(norm[kScale] + channel, folded.scale);
  global_store(norm[kShift] + channel, folded.shift);
  global_store(norm[kMean] + channel, folded.mean);
  global_store(norm[kRstd] + channel, folded.rstd);
  global_store(norm[kBeta] + channel, folded.beta);
}

// A norm that is folded when the last of its statistics are there: those of `own` channels from
// `first` on. Nothing where norm is null.
template <typename A>
struct NextFold {
  Rows<const A> stats{};
  const A *gamma = nullptr, *beta = nullptr;
  double eps = 0.0;
  Rows<A> norm{};
  int channels = 0, first = 0;
};

template <typename A>
NextFold<A> next_fold(const arguments::FoldedNext& next) {
  if (!next.norm) return {};
  return {input_rows<A>(next.stats),     input_rows<A>(next.gamma).data,
          input_rows<A>(next.beta).data, next.eps,
          output_rows<A>(next.norm),     static_cast<int>(next.C),
          static_cast<int>(next.first)};
}

// The correction [4, C] of a norm for statistics over `count` rows (0: p = q = 0), or p and q added
// to one of several norms. Nothing where table is null.
template <typename A>
struct NormCorrection {
  Rows<const A> norm{};
  Rows<A> table{};
  int64_t count = 0;
  bool accumulate = false;
};

// Of a convolution's backward.
template <typename A, typename Call>
NormCorrection<A> correction_of(const Call& call, bool accumulate) {
  if (!call.x_correction) return {};
  return {input_rows<A>(call.norm), output_rows<A>(call.x_correction), call.count, accumulate};
}

// What follows from one of a channel's two sums: p from dbeta, with the rows that need no sum, or q
// from dgamma.
template <typename A>
__device__ __forceinline__ void store_correction(const NormCorrection<A>& args, DnormRow row,
                                                 int channel, A sum) {
  using namespace device;
  const A scale = global_load<A>(args.norm[kScale] + channel);
  double value = args.count > 0 ? double(scale) / double(args.count) : 0.0;
  if (row == kDgamma) value *= global_load<A>(args.norm[kRstd] + channel);
  value = args.count > 0 ? value * double(sum) : 0.0;
  A* const to = args.table[row == kDbeta ? kP : kQ] + channel;
  if (args.accumulate) {
    value += global_load<A>(to);
  } else if (row == kDbeta) {
    global_store(args.table[kA] + channel, scale);
    global_store(args.table[kCenter] + channel, global_load<A>(args.norm[kMean] + channel));
  }
  global_store(to, A(value));
}

}  // namespace densenet_efficient
