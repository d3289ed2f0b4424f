// Rounding to a 16-bit type that keeps sums.
//
// A gradient that lies on the grid of bfloat16 or float16 already, minus a correction of less than
// half a step, rounds to nearest back to itself: the correction is lost at every pixel, and with it
// the property that the gradient through a batch norm has sum zero. Dithered rounding goes to the
// neighbour below or above with probabilities that keep the mean; values of the grid stay. The
// noise is a hash of the element's index, so the same call gives the same bits.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "norm_relu.h"

namespace densenet_efficient {

// 16 bits that look random: two multiplications by odd numbers and a shift between.
DE_HOST_DEVICE uint32_t dither_noise(uint32_t index) {
  uint32_t hash = index * 0x9e3779b1u;
  hash = (hash ^ (hash >> 15)) * 0x85ebca77u;
  return hash >> 16;
}

// `value` on the grid of floats whose last kDropped (at most 16) mantissa bits are zero and, in
// magnitude below `smallest`, on the grid that begins there: the subnormal numbers.
template <int kDropped>
DE_HOST_DEVICE float dithered(float value, float smallest, uint32_t index) {
  constexpr uint32_t kSign = 0x80000000u, kBelow = (1u << kDropped) - 1u;
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  const uint32_t sign = bits & kSign;
  bits &= ~kSign;
  float magnitude;
  memcpy(&magnitude, &bits, sizeof(bits));
  const float lift = magnitude < smallest ? smallest : 0.0f;
  magnitude += lift;
  memcpy(&bits, &magnitude, sizeof(bits));
  bits = (bits + (dither_noise(index) >> (16 - kDropped))) & ~kBelow;
  memcpy(&magnitude, &bits, sizeof(bits));
  magnitude -= lift;
  memcpy(&bits, &magnitude, sizeof(bits));
  bits |= sign;
  float rounded;
  memcpy(&rounded, &bits, sizeof(bits));
  return value == value ? rounded : value;  // a NaN stays one
}

// A value of arithmetic type on the grid of the storage type T. bfloat16 has float's exponents and
// subnormal numbers; those of float16 begin at 2^-14. Wider types are left to their own rounding.
template <typename T, typename A>
DE_HOST_DEVICE A dithered_as(A value, uint32_t index) {
  if constexpr (std::is_same_v<T, torch::headeronly::BFloat16>)
    return dithered<16>(value, 0.0f, index);
  else if constexpr (std::is_same_v<T, torch::headeronly::Half>)
    return dithered<13>(value, 0x1p-14f, index);
  else
    return value;
}

}  // namespace densenet_efficient
