// Rows of channels in global memory, a chunk of 16 bytes at a time: into shared memory, into
// registers and out of them, whatever the rows are aligned to.
#pragma once

#include "mma.cuh"

namespace densenet_efficient::device {

template <typename T>
constexpr int kChunk = 16 / static_cast<int>(sizeof(T));  // channels in 16 bytes

// Rows of channels in global memory.
struct RowTensor {
  void* data;
  int64_t stride;  // elements between two rows, at least the number of channels
  int vector;  // elements of the widest aligned access: 16 bytes' worth, or a power of two below

  template <typename T>
  DE_HOST_DEVICE T* at(int64_t row, int channel) const {
    return static_cast<T*>(data) + row * stride + channel;
  }
  // The same rows from a later channel on, a multiple of eight; the same channels from a later row
  // on.
  template <typename T>
  DE_HOST_DEVICE RowTensor from_channel(int channel) const {
    return {at<T>(0, channel), stride, vector};
  }
  template <typename T>
  DE_HOST_DEVICE RowTensor from_row(int64_t row) const {
    return {at<T>(row, 0), stride, vector};
  }
};

// Bytes from row to row, and where row `row` after `row0` begins from a channel on: what differs
// from thread to thread, row and channel, fits 32 bits.
template <typename T>
__device__ __forceinline__ int row_pitch(const RowTensor& rows) {
  return static_cast<int>(rows.stride) * static_cast<int>(sizeof(T));
}
template <typename T>
__device__ __forceinline__ const unsigned char* row_bytes(const RowTensor& rows, int64_t row0,
                                                          int row, int channel) {
  return static_cast<const unsigned char*>(rows.data) + row0 * row_pitch<T>(rows) +
         (row * row_pitch<T>(rows) + channel * static_cast<int>(sizeof(T)));
}

// A [rows, C] table of fp32 vectors: norm or correction.
struct Table {
  const float* data;
  int64_t stride;

  DE_HOST_DEVICE Table from_channel(int channel) const { return {data + channel, stride}; }
};

// How many of a chunk's channels exist where `left` are left. Never compare it with kChunk: for
// sm_90, ptxas 13.0 turns max(min(left, 8), 0) == 8 into left > 0. Ask whether left >= kChunk.
template <typename T>
__device__ __forceinline__ int valid_channels(int left) {
  return max(min(left, kChunk<T>), 0);
}

// ---- A chunk at a time --------------------------------------------------------------------------

// Rows aligned to 16 or 8 bytes are copied whole or in halves, any others channel by channel: slow,
// but none of the networks' slices is like that.

template <typename T>
using Bits = std::conditional_t<kIs16Bit<T>, uint16_t, uint32_t>;
template <typename T>
constexpr int kHalf = kChunk<T> / 2;

// `left` says how many channels are left from a chunk's (or half's, or four's) first one on: it may
// be more than they hold, and negative past the end.

// Copies a chunk to shared memory: the channels that are left, zeros for the others.
template <typename T>
__device__ __forceinline__ void copy_chunk(unsigned char* shared, const T* global, int left,
                                           int vector DE_HERE) {
  constexpr int kSize = sizeof(T);
  if (vector == kChunk<T>) {
    cp_async<16>(shared, global, kSize * valid_channels<T>(left) DE_AT);
  } else if (vector == kHalf<T>) {
    // Half of the chunks of 256 bytes copy their upper half first, or half the banks would idle.
    const int first = reinterpret_cast<uintptr_t>(shared) >> 7 & 1 ? kHalf<T> : 0;
    const int second = kHalf<T> - first;
    cp_async<8>(shared + kSize * first, global + first,
                kSize * min(max(left - first, 0), kHalf<T>) DE_AT);
    cp_async<8>(shared + kSize * second, global + second,
                kSize * min(max(left - second, 0), kHalf<T>) DE_AT);
  } else {
#pragma unroll 1
    for (int c = 0; c < kChunk<T>; ++c)
      shared_store<Bits<T>>(shared + kSize * c,
                            c < left ? global_load<Bits<T>>(global + c DE_AT) : Bits<T>(0) DE_AT);
  }
}

// Half a chunk: the channels that are left, zeros for the others.
template <typename T>
__device__ __forceinline__ uint2 load_half(const T* global, int left, int vector DE_HERE) {
  if (vector >= kHalf<T> && left >= kHalf<T>) return global_load<uint2>(global DE_AT);
  uint64_t bits = 0;
#pragma unroll 1
  for (int c = 0; c < kHalf<T> && c < left; ++c)
    bits |= uint64_t(global_load<Bits<T>>(global + c DE_AT)) << (8 * sizeof(T) * c);
  return uint2{static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32)};
}

// A chunk in registers, likewise.
template <typename T>
__device__ __forceinline__ uint4 load_chunk(const T* global, int left, int vector DE_HERE) {
  if (vector == kChunk<T> && left >= kChunk<T>) return global_load<uint4>(global DE_AT);
  const uint2 low = load_half(global, left, vector DE_AT);
  const uint2 high = load_half(global + kHalf<T>, left - kHalf<T>, vector DE_AT);
  return uint4{low.x, low.y, high.x, high.y};
}

// Writes the channels of half a chunk that are left.
template <typename T>
__device__ __forceinline__ void store_half(T* global, uint2 half, int left, int vector DE_HERE) {
  if (vector >= kHalf<T> && left >= kHalf<T>) {
    global_store(global, half DE_AT);
    return;
  }
  const uint64_t bits = half.x | uint64_t(half.y) << 32;
#pragma unroll 1
  for (int c = 0; c < kHalf<T> && c < left; ++c)
    global_store(global + c, static_cast<Bits<T>>(bits >> (8 * sizeof(T) * c)) DE_AT);
}

// Writes the channels of a chunk that are left.
template <typename T>
__device__ __forceinline__ void store_chunk(T* global, uint4 chunk, int left, int vector DE_HERE) {
  if (vector == kChunk<T> && left >= kChunk<T>) {
    global_store(global, chunk DE_AT);
    return;
  }
  store_half(global, uint2{chunk.x, chunk.y}, left, vector DE_AT);
  store_half(global + kHalf<T>, uint2{chunk.z, chunk.w}, left - kHalf<T>, vector DE_AT);
}

// A chunk of each of kRows rows, `pitch` bytes apart: chunk_of(i) to row offset_of(i), which is
// negative where there is none. Whole chunks go without a branch.
template <typename T, int kRows, typename OffsetOf, typename ChunkOf>
__device__ __forceinline__ void store_rows(T* global, int pitch, int left, int vector,
                                           OffsetOf offset_of, ChunkOf chunk_of DE_HERE) {
  if (vector == kChunk<T> && left >= kChunk<T>) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int offset = offset_of(i);
      const uint4 chunk = chunk_of(i);
      if (offset >= 0) global_store(advance(global, offset, pitch), chunk DE_AT);
    }
  } else if (left > 0) {
#pragma unroll 1
    for (int i = 0; i < kRows; ++i) {
      const int offset = offset_of(i);
      if (offset >= 0) store_chunk(advance(global, offset, pitch), chunk_of(i), left, vector DE_AT);
    }
  }
}

// Four neighbouring channels, likewise.
template <typename T>
__device__ __forceinline__ Four<T> load_four(const T* global, int left, int vector DE_HERE) {
  if constexpr (kIs16Bit<T>)
    return load_half(global, left, vector DE_AT);
  else
    return load_chunk(global, left, vector DE_AT);
}
template <typename T>
__device__ __forceinline__ void store_four(T* global, Four<T> four, int left, int vector DE_HERE) {
  if constexpr (kIs16Bit<T>)
    store_half(global, four, left, vector DE_AT);
  else
    store_chunk(global, four, left, vector DE_AT);
}

__device__ __forceinline__ void to_array(uint4 chunk, uint32_t (&words)[4]) {
  words[0] = chunk.x;
  words[1] = chunk.y;
  words[2] = chunk.z;
  words[3] = chunk.w;
}

}  // namespace densenet_efficient::device
