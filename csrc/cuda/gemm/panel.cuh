// Tiles of activations between global memory, shared memory and the tensor cores: what the
// convolution kernels share. T is the storage type: BFloat16, Half, or float for TF32
// (gemm/mma.cuh).
//
// A panel is [rows, 64 bytes of channels] in shared memory: four chunks of 16 bytes a row, their
// order permuted by bits 1 and 2 of the row. Every way in which the kernels touch a panel meets
// each bank once:
//   ldmatrix        one chunk of eight rows whose numbers differ modulo 8
//   16-byte access  four chunks of each row, rows in pairs of an even and an odd one
//   8-byte access   two neighbouring chunks of rows 0, 1, 4, 5 or 2, 3, 6, 7 (modulo eight)
//   4-byte access   an accumulator: one chunk of eight rows; or two whole rows
// Of 32-bit channels, bit 1 of the row decides on the upper bit of the chunk, not the lower one:
//   4- and 8-byte   two neighbouring chunks of four consecutive rows, the form of accumulators and
//   access          of transposed operands, which ldmatrix cannot serve
#pragma once

#include "../tiling/panel.h"
#include "row_io.cuh"

namespace densenet_efficient::device {

using tiling::kPanelRowBytes;
template <typename T>
constexpr int kPanelChannels = tiling::panel_channels(sizeof(T));

template <typename T>
__device__ __forceinline__ int panels_of(int channels) {
  return (channels + kPanelChannels<T> - 1) / kPanelChannels<T>;
}

// For row * 64 + byte.
template <typename T>
__device__ __forceinline__ int swizzle_chunks(int offset) {
  if constexpr (kIs16Bit<T>)
    return offset ^ ((offset >> 3) & 0x30);
  else
    return offset ^ ((offset >> 2) & 0x20) ^ ((offset >> 4) & 0x10);
}

template <typename T>
__device__ __forceinline__ int panel_offset(int row, int chunk) {
  return swizzle_chunks<T>(row * kPanelRowBytes + chunk * 16);
}

// Of the byte that follows the chunk's first by `byte`, in the chunk or a later one.
template <typename T>
__device__ __forceinline__ int byte_offset(int row, int chunk, int byte) {
  return panel_offset<T>(row, chunk + (byte >> 4)) + (byte & 15);
}

// What the row's number does to an offset within the row.
template <typename T>
__device__ __forceinline__ int row_swizzle(int row) {
  return panel_offset<T>(row, 0) ^ (row * kPanelRowBytes);
}

// ---- Copies -------------------------------------------------------------------------------------

// Rows [0, rows) of a panel's, from its row `position` on, are to be copied: row i from the
// tensor's row row0 + i where begin <= i < end (which may lie past the rows), zeros elsewhere;
// channels from `channel` on, up to `channels`.
struct RowCopy {
  int position;
  int64_t row0;
  int begin, end, rows;
  int channel, channels;
};

// A thread's part of it: chunk thread % 4 of every (threads / 4)-th row. A multiple of eight
// rows, so that chunks keep their order from row to row and a row's place is a product and a sum.
// What does not exist is stored as zeros: a copy that a predicate may switch off costs three
// instructions more. A chunk that the channels' end cuts, and rows not aligned to 16 bytes, go a
// way of their own.
template <typename T>
__device__ __forceinline__ void copy_rows(unsigned char* panel, const RowTensor& from,
                                          const RowCopy& copy, int threads) {
  const int chunk = thread_index() & 3, first = thread_index() >> 2, step = threads >> 2;
  const int left = copy.channels - copy.channel - chunk * kChunk<T>;
  panel += panel_offset<T>(copy.position + first, chunk) - first * kPanelRowBytes;
  // The first row and channel are the same for all threads; the rest fits 32 bits.
  const int pitch = static_cast<int>(from.stride) * static_cast<int>(sizeof(T));
  const unsigned char* const row0 =
      reinterpret_cast<const unsigned char*>(from.at<T>(copy.row0, copy.channel)) + chunk * 16;
  const auto at = [&](int row) { return advance(row0, row, pitch); };
  int row = first;
  if (from.vector == kChunk<T> && (left >= kChunk<T> || left <= 0)) {
    const int end = left > 0 ? min(copy.end, copy.rows) : 0;
    const auto clear_until = [&](int last) {
#pragma unroll 1
      for (; row < last; row += step) shared_store(panel + row * kPanelRowBytes, uint4{0, 0, 0, 0});
    };
    clear_until(copy.begin);
    // Copies one after the other without a branch are the cheapest.
    const auto copy_row = [&](int r) { cp_async<16>(panel + r * kPanelRowBytes, at(r)); };
#pragma unroll 1
    for (; row + 3 * step < end; row += 4 * step) {
#pragma unroll
      for (int i = 0; i < 4; ++i) copy_row(row + i * step);
    }
    if (row + step < end) {
      copy_row(row);
      copy_row(row + step);
      row += 2 * step;
    }
    if (row < end) {
      copy_row(row);
      row += step;
    }
    clear_until(copy.rows);
    return;
  }
#pragma unroll 1
  for (; row < copy.rows; row += step)
    copy_chunk(panel + row * kPanelRowBytes, reinterpret_cast<const T*>(at(row)),
               row >= copy.begin && row < copy.end ? left : 0, from.vector);
}

// ---- Norms --------------------------------------------------------------------------------------

// Scale and shift of a panel's channels in shared memory, a pair per channel; 16-byte pieces of the
// last two chunks of 16-bit channels change places, so that four threads at the heads of the chunks
// meet no bank twice.
template <typename T>
constexpr int kScaleShiftBytes = tiling::scale_shift_bytes(sizeof(T));
__device__ __forceinline__ int scale_shift_offset(int channel) {
  return (8 * channel) ^ (channel & 16);
}

// Channels past the end get zeros, which make zeros of whatever they meet.
template <typename T>
__device__ __forceinline__ void copy_scale_shift(unsigned char* shared, Table norm, int channel,
                                                 int channels, int thread, int threads) {
  for (int i = thread; i < 2 * kPanelChannels<T>; i += threads) {
    const int row = i & 1, c = i >> 1;
    const bool exists = channel + c < channels;
    cp_async<4>(shared + scale_shift_offset(c) + 4 * row,
                norm.data + (exists ? (kScale + row) * norm.stride + channel + c : 0),
                exists ? 4 : 0);
  }
}

// The same, where thread `thread` takes that channel of the panel, if there is one.
template <typename T>
__device__ __forceinline__ void copy_scale_shift(unsigned char* shared, Table norm, int channel,
                                                 int channels, int thread) {
  if (thread >= kPanelChannels<T>) return;
  const float* const from = norm.data + channel + thread;
  unsigned char* const to = shared + scale_shift_offset(thread);
  const int bytes = channel + thread < channels ? 4 : 0;
  const int pitch = 4 * static_cast<int>(norm.stride);
  const int first = lane_index() >> 4;  // half a warp takes the shift first, by the banks
  cp_async<4>(to + 4 * first, advance(from, kScale + first, pitch), bytes);
  cp_async<4>(to + 4 * (1 - first), advance(from, kShift - first, pitch), bytes);
}

// The rows of a norm down to rstd for a panel's channels, as [channels][4].
template <typename T>
__device__ __forceinline__ void copy_norm(unsigned char* shared, Table norm, int channel,
                                          int channels, int thread) {
  if (thread >= kPanelChannels<T>) return;
  const float* const from = norm.data + (channel + thread);
  const int bytes = channel + thread < channels ? 4 : 0;
  const int pitch = 4 * static_cast<int>(norm.stride);
#pragma unroll
  for (int i = 0; i < kBeta; ++i) {
    const int row = (i + (thread >> 3)) % kBeta;  // every eight threads another one, by the banks
    cp_async<4>(shared + 4 * (kBeta * thread + row), advance(from, row, pitch), bytes);
  }
}

// All four rows of a table for one channel; zeros past the end.
__device__ __forceinline__ float4 load_entries(Table table, int channel, int channels) {
  if (channel >= channels) return float4{0, 0, 0, 0};
  const float* from = table.data + channel;
  return float4{global_load<float>(from), global_load<float>(from + table.stride),
                global_load<float>(from + 2 * table.stride),
                global_load<float>(from + 3 * table.stride)};
}

template <typename T>
__device__ __forceinline__ OperandNorm<T> load_operand_norm(const unsigned char* norm,
                                                            int channel) {
  return shared_load<OperandNorm<T>>(norm + scale_shift_offset(channel));
}

// Normalises one chunk of each of a panel's rows in place: chunk thread % 4 of every
// (threads / 4)-th row.
template <typename T>
__device__ __forceinline__ void normalise_panel(unsigned char* panel, const unsigned char* norm,
                                                int rows, int threads) {
  const int chunk = thread_index() & 3;
  OperandNorm<T> norms[4];
#pragma unroll
  for (int i = 0; i < 4; ++i)
    norms[i] = load_operand_norm<T>(norm, chunk * kChunk<T> + i * kOperandChannels<T>);
  const auto normalise = [&](uint4& v) {
    v.x = norm_relu_operand<T>(v.x, norms[0]);
    v.y = norm_relu_operand<T>(v.y, norms[1]);
    v.z = norm_relu_operand<T>(v.z, norms[2]);
    v.w = norm_relu_operand<T>(v.w, norms[3]);
  };
  // Two rows at a time, so that one is loaded while the other is worked on. Eight rows further on
  // the order of the chunks is the same, and a step is a multiple of eight.
  const int step = threads >> 2;
  int row = thread_index() >> 2;
  unsigned char* at = panel + panel_offset<T>(row, chunk);
  for (; row + step < rows; row += 2 * step, at += 2 * step * kPanelRowBytes) {
    unsigned char* const next = at + step * kPanelRowBytes;
    uint4 v = shared_load<uint4>(at), w = shared_load<uint4>(next);
    normalise(v);
    normalise(w);
    shared_store(at, v);
    shared_store(next, w);
  }
  if (row < rows) {
    uint4 v = shared_load<uint4>(at);
    normalise(v);
    shared_store(at, v);
  }
}

// ---- Tensor-core operands from panels -----------------------------------------------------------

// The depth along the channels: where a lane points ldmatrix for 16 rows of A, and for two tiles of
// eight columns of B, whose columns are the panel's rows. The second half of a panel's bytes is
// the next depth: its offset is the first's, exclusive or 32.
__device__ __forceinline__ int a_row(int lane) { return lane & 15; }
__device__ __forceinline__ int a_chunk(int lane) { return lane >> 4; }
__device__ __forceinline__ int b_row(int lane) { return (lane & 7) | ((lane >> 1) & 8); }
__device__ __forceinline__ int b_chunk(int lane) { return (lane >> 3) & 1; }

// The depth along the panel's rows: an operand of 16 of its channels. Of 16-bit channels a lane
// points ldmatrix at one row (A as above B, B as above A); of 32-bit ones it takes its own words
// from two. Pointers are offsets of a row and a byte in there.
template <typename T>
constexpr int kPointers = kIs16Bit<T> ? 1 : 2;

template <typename T>
__device__ __forceinline__ int a_depth(int lane, int pointer) {
  return kIs16Bit<T> ? b_row(lane) : (lane & 3) + 4 * pointer;
}
template <typename T>
__device__ __forceinline__ int a_byte(int lane) {
  return kIs16Bit<T> ? 16 * b_chunk(lane) : 4 * (lane >> 2);
}
template <typename T>
__device__ __forceinline__ int b_depth(int lane, int pointer) {
  return kIs16Bit<T> ? a_row(lane) : (lane & 3) + 4 * pointer;
}
template <typename T>
__device__ __forceinline__ int b_byte(int lane) {
  return kIs16Bit<T> ? 16 * a_chunk(lane) : 4 * (lane >> 2);
}

// `swizzle`: 32 for the second 16 channels of a panel that has them.
template <typename T>
__device__ __forceinline__ void load_a_transposed(uint32_t (&a)[4], const unsigned char* from,
                                                  const int (&pointers)[kPointers<T>],
                                                  int swizzle DE_HERE) {
  if constexpr (kIs16Bit<T>) {
    ldmatrix_x4_trans(a, from + (pointers[0] ^ swizzle) DE_AT);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      a[i] = shared_load<uint32_t>(from + (pointers[i >> 1] ^ (32 * (i & 1))) DE_AT);
  }
}
template <typename T>
__device__ __forceinline__ void load_b_transposed(uint32_t (&b)[4], const unsigned char* from,
                                                  const int (&pointers)[kPointers<T>],
                                                  int swizzle DE_HERE) {
  if constexpr (kIs16Bit<T>) {
    ldmatrix_x4_trans(b, from + (pointers[0] ^ swizzle) DE_AT);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      b[i] = shared_load<uint32_t>(from + (pointers[i & 1] ^ (32 * (i >> 1))) DE_AT);
  }
}

// Where the first of a lane's accumulators lies, as a panel's channels: two in row lane / 4, those
// of the next row tile eight rows further on. The next column tile's is flipped by its bytes.
template <typename T>
__device__ __forceinline__ int accumulator_offset(int lane) {
  return byte_offset<T>(lane >> 2, 0, 2 * static_cast<int>(sizeof(T)) * (lane & 3));
}

// Where the 16 channels from 16 * i on are, in panels of `pitch` bytes, and their swizzle.
template <typename T>
__device__ __forceinline__ int sixteen_offset(int i, int pitch) {
  return (kIs16Bit<T> ? i / 2 : i) * pitch;
}
template <typename T>
__device__ __forceinline__ int sixteen_swizzle(int i) {
  return kIs16Bit<T> ? 32 * (i & 1) : 0;
}

}  // namespace densenet_efficient::device
