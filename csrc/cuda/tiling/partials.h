// The partial results of a reduction over blocks: what the first pass of an operator writes, and
// the second (reduce/finish.cuh) combines. One layout for all of them: [blocks][rows][channels], in
// the type of the accumulation; the rows are count, mean and M2 of moments, or sums.
#pragma once

#include <cstdint>

namespace densenet_efficient::tiling {

constexpr int kMomentRows = 3;   // count, mean, M2: the statistics of an output
constexpr int kNormSumRows = 2;  // dgamma, dbeta: the gradient of a norm

// Bytes of the partial results of activations of `size` bytes an element, which are accumulated in
// float32, or in float64 for float64.
constexpr int64_t partial_bytes(int64_t blocks, int64_t rows, int64_t channels, int64_t size) {
  return blocks * rows * channels * (size == 8 ? 8 : 4);
}

}  // namespace densenet_efficient::tiling
