// Matrix products on tiles that stay in the cache. Every convolution here is sums of these, on
// operands that were normalised while they were loaded.
//
//   c [m, n] (+)= sum over segments g and steps k of  a(row, g, k) * b(g, k, column)
//
// a is read one unit at a time and broadcast: row-major (a_step 1) or transposed (a_row 1). b is
// read in vectors: panels of kPanel columns, packed from a weight, or a row-major tile (b_panel =
// kPanel). A segment is a stretch of evenly spaced steps: 1 for a 1x1 convolution, the kernel rows
// of a 3x3. The steps of one product are summed from zero, in order, and added to c at the end:
// over many tiles that loses less than one long chain of additions.
#pragma once

#include "../numeric.h"

namespace densenet_efficient::cpu {

// Columns of a panel: two vectors of accumulators.
template <typename U>
constexpr int64_t kPanel = 2 * kVectorBytes / static_cast<int64_t>(sizeof(U));

template <typename U>
using Accumulator = std::conditional_t<std::is_same_v<U, double>, double, float>;

// Strides count units of U, those of c count accumulators.
template <typename U>
struct Product {
  int64_t m, n;             // n columns are written, rounded up to whole vectors
  int64_t segments, depth;  // steps in a segment
  const U* a;
  int64_t a_row, a_step, a_segment;
  const U* b;
  int64_t b_panel, b_step, b_segment;
  Accumulator<U>* c;
  int64_t c_row;
  bool accumulate;  // add to what c holds
};

template <typename U>
void product(const Product<U>& p);
extern template void product(const Product<double>&);
extern template void product(const Product<float>&);
extern template void product(const Product<uint32_t>&);

// Packs b(k, column) = weight[k * k_stride + column * n_stride], k < depth, into one panel (columns
// past n are zero): ceil(depth / group) steps.
template <typename T>
void pack_panel(const T* weight, int64_t depth, int64_t n, int64_t k_stride, int64_t n_stride,
                Unit<T>* panel);
extern template void pack_panel(const double*, int64_t, int64_t, int64_t, int64_t, Unit<double>*);
extern template void pack_panel(const float*, int64_t, int64_t, int64_t, int64_t, Unit<float>*);
extern template void pack_panel(const Half*, int64_t, int64_t, int64_t, int64_t, Unit<Half>*);
extern template void pack_panel(const BFloat16*, int64_t, int64_t, int64_t, int64_t,
                                Unit<BFloat16>*);

}  // namespace densenet_efficient::cpu
