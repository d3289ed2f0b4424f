// What tensor cores take: operands in 32-bit words. A word holds two neighbouring 16-bit channels,
// or one float32 channel in TF32: rounded to ten bits of fraction. Everything in which the two
// differ that is not about where a word lies (gemm/panel.cuh) is here, by the storage type T.
//
// A product d [16, 8] += a [16, kDepth] @ b [kDepth, 8] takes 32 bytes of depth from each row, 16
// bytes (kDepth / 2 channels) of which are in a lane's first words, the others in its second:
// with t = lane % 4, word i begins at channel kDepth / 2 * i + kOperandChannels * t.
#pragma once

#include <type_traits>

#include "../device.cuh"

namespace densenet_efficient::device {

template <typename T>
constexpr int kOperandChannels = 4 / static_cast<int>(sizeof(T));
template <typename T>
constexpr int kDepth = 32 / static_cast<int>(sizeof(T));
template <typename T>
constexpr bool kIs16Bit = sizeof(T) == 2;

template <typename T>
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2] DE_HERE) {
  if constexpr (kIs16Bit<T>)
    mma_16x8x16<T>(d, a, b DE_AT);
  else
    mma_16x8x8_tf32(d, a, b DE_AT);
}

// Two tiles of eight columns, side by side: b holds both words of the left, then of the right one.
template <typename T>
__device__ __forceinline__ void multiply_add_pair(float (&left)[4], float (&right)[4],
                                                  const uint32_t (&a)[4],
                                                  const uint32_t (&b)[4] DE_HERE) {
  multiply_add<T>(left, a, {b[0], b[1]} DE_AT);
  multiply_add<T>(right, a, {b[2], b[3]} DE_AT);
}

template <typename T>
__device__ __forceinline__ void unpack_operand(uint32_t word,
                                               float (&values)[kOperandChannels<T>]) {
  if constexpr (kIs16Bit<T>) {
    const float2 two = unpack<T>(word);
    values[0] = two.x;
    values[1] = two.y;
  } else {
    values[0] = to_float_bits(word);
  }
}

// A word's channels, rounded, an operand.
template <typename T>
__device__ __forceinline__ uint32_t to_operand(const float (&values)[kOperandChannels<T>]) {
  if constexpr (kIs16Bit<T>)
    return pack<T>(values[0], values[1]);
  else
    return to_tf32(values[0]);
}

// What rounding left of a value; nothing where it is not finite, or was rounded to infinity.
__device__ __forceinline__ float residual_of(float value, float rounded) {
  const float residual = value - rounded;
  return fabsf(residual) <= fabsf(value) ? residual : 0.0f;
}

// Words as they lie in memory, made operands: 16-bit ones are.
template <typename T>
__device__ __forceinline__ uint32_t round_operand(uint32_t word) {
  return kIs16Bit<T> ? word : to_tf32(to_float_bits(word));
}
template <typename T>
__device__ __forceinline__ void round_operands(uint32_t (&words)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) words[i] = round_operand<T>(words[i]);
}

// Floats made operands, and what their rounding left as well.
__device__ __forceinline__ void split_operands(uint32_t (&words)[4], uint32_t (&residual)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float value = to_float_bits(words[i]);
    words[i] = to_tf32(value);
    residual[i] = to_tf32(residual_of(value, to_float_bits(words[i])));
  }
}

// ---- Norms --------------------------------------------------------------------------------------

// Scale and shift of a word's channels: (a0, s0, a1, s1) or (a0, s0).
template <typename T>
using OperandNorm = std::conditional_t<kIs16Bit<T>, float4, float2>;

// Where both halves of a word are one channel's.
template <typename T>
__device__ __forceinline__ OperandNorm<T> same_norm(float scale, float shift) {
  if constexpr (kIs16Bit<T>)
    return float4{scale, shift, scale, shift};
  else
    return float2{scale, shift};
}

// Scale and shift of one of them.
template <typename T>
__device__ __forceinline__ float2 channel_norm(OperandNorm<T> norm, int channel) {
  if constexpr (kIs16Bit<T>)
    return channel ? float2{norm.z, norm.w} : float2{norm.x, norm.y};
  else
    return norm;
}

// relu(a x + s) of a word, an operand.
template <typename T>
__device__ __forceinline__ uint32_t norm_relu_operand(uint32_t word, OperandNorm<T> norm) {
  if constexpr (kIs16Bit<T>) {
    const float2 x = unpack<T>(word);
    return pack_relu<T>(normalise(x.x, norm.x, norm.y), normalise(x.y, norm.z, norm.w));
  } else {
    return to_tf32(norm_relu(to_float_bits(word), norm.x, norm.y));
  }
}

// A channel's entries of the correction (a, p, q, mean) as the kernels keep them. Those of 16-bit
// channels become (a, c, -q) with c = mean q - p, an instruction a value less: the difference of
// value and mean, which c takes apart, is no finer than the values themselves.
template <typename T>
__device__ __forceinline__ float4 kept_correction(float4 entries) {
  if constexpr (kIs16Bit<T>)
    return float4{entries.x, entries.w * entries.z - entries.y, -entries.z, 0.0f};
  else
    return entries;
}

// The corrected gradient of a word, an operand; kept entries of its channels.
template <typename T>
__device__ __forceinline__ uint32_t correct_operand(uint32_t dz, uint32_t x,
                                                    const float4 (&entries)[kOperandChannels<T>]) {
  const float4 low = entries[0];
  if constexpr (kIs16Bit<T>) {
    const float4 high = entries[1];
    const float2 d = unpack<T>(dz), v = unpack<T>(x);
    return pack<T>(normalise(d.x, low.x, normalise(v.x, low.z, low.y)),
                   normalise(d.y, high.x, normalise(v.y, high.z, high.y)));
  } else {
    return to_tf32(correct(to_float_bits(dz), to_float_bits(x), low.x, low.y, low.z, low.w));
  }
}

// ---- Neighbouring channels ----------------------------------------------------------------------

// Two channels, as a lane holds them of a product, and four: as they lie in memory.
template <typename T>
using Two = std::conditional_t<kIs16Bit<T>, uint32_t, uint2>;
template <typename T>
using Four = std::conditional_t<kIs16Bit<T>, uint2, uint4>;

template <typename T>
__device__ __forceinline__ Two<T> pack_two(float low, float high) {
  if constexpr (kIs16Bit<T>)
    return pack<T>(low, high);
  else
    return uint2{to_bits(low), to_bits(high)};
}
template <typename T>
__device__ __forceinline__ float2 unpack_two(Two<T> two) {
  if constexpr (kIs16Bit<T>)
    return unpack<T>(two);
  else
    return float2{to_float_bits(two.x), to_float_bits(two.y)};
}
template <typename T>
__device__ __forceinline__ Four<T> pack_four(const float (&values)[4]) {
  const Two<T> low = pack_two<T>(values[0], values[1]), high = pack_two<T>(values[2], values[3]);
  if constexpr (kIs16Bit<T>)
    return uint2{low, high};
  else
    return uint4{low.x, low.y, high.x, high.y};
}
template <typename T>
__device__ __forceinline__ void unpack_four(Four<T> four, float (&values)[4]) {
  float2 low, high;
  if constexpr (kIs16Bit<T>) {
    low = unpack<T>(four.x);
    high = unpack<T>(four.y);
  } else {
    low = unpack_two<T>(uint2{four.x, four.y});
    high = unpack_two<T>(uint2{four.z, four.w});
  }
  values[0] = low.x;
  values[1] = low.y;
  values[2] = high.x;
  values[3] = high.y;
}

}  // namespace densenet_efficient::device
