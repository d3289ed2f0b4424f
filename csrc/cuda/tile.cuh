// Tiles of 16-bit activations between global memory, shared memory and the tensor cores: what the
// convolution kernels share.
//
// A panel is [rows, 32 channels] in shared memory: 64 bytes a row in four chunks of 16 bytes, their
// order permuted by the row. Every way in which the kernels touch a panel meets each bank once:
//   ldmatrix        one chunk of eight rows whose numbers differ modulo 8
//   16-byte access  four chunks of each row, rows in pairs of an even and an odd one
//   8-byte access   two neighbouring chunks of rows 0, 1, 4, 5 or 2, 3, 6, 7 (modulo eight)
//   4-byte access   an accumulator: one chunk of eight rows; or two whole rows
#pragma once

#include "device.cuh"

namespace densenet_efficient::device {

constexpr int kPanelChannels = 32;
constexpr int kPanelRowBytes = 64;
constexpr int kChunk = 8;  // channels in 16 bytes

// Rows of 16-bit channels in global memory.
struct RowTensor {
  void* data;
  int64_t stride;  // elements between two rows, at least the number of channels
  int vector;      // elements of the widest aligned access: 8, 4, 2 or 1

  template <typename T>
  DE_HOST_DEVICE T* at(int64_t row, int channel) const {
    return static_cast<T*>(data) + row * stride + channel;
  }
  // The same rows from a later channel on, a multiple of eight; the same channels from a later row
  // on.
  DE_HOST_DEVICE RowTensor from_channel(int channel) const {
    return {at<uint16_t>(0, channel), stride, vector};
  }
  DE_HOST_DEVICE RowTensor from_row(int64_t row) const {
    return {at<uint16_t>(row, 0), stride, vector};
  }
};

// A [rows, C] table of fp32 vectors: norm or correction.
struct Table {
  const float* data;
  int64_t stride;

  DE_HOST_DEVICE Table from_channel(int channel) const { return {data + channel, stride}; }
};

// For row * 64 + chunk * 16.
__device__ __forceinline__ int permute_chunks(int offset) {
  return offset ^ ((offset >> 3) & 0x30);
}

__device__ __forceinline__ int panel_offset(int row, int chunk) {
  return permute_chunks(row * kPanelRowBytes + chunk * 16);
}

// How many of the eight channels from `channel` on exist.
__device__ __forceinline__ int channels_left(int channel, int channels) {
  const int left = channels - channel;
  return left < 0 ? 0 : left > kChunk ? kChunk : left;
}

// ---- Global memory, a chunk at a time -----------------------------------------------------------

// Rows aligned to 16 or 8 bytes are copied whole or in halves, any others channel by channel: slow,
// but none of the networks' slices is like that.

// Copies a chunk to shared memory; of its channels the first `valid` are read, the others are zero.
template <typename T>
__device__ __forceinline__ void copy_chunk(unsigned char* shared, const T* global, int valid,
                                           int vector DE_HERE) {
  if (vector == 8) {
    cp_async<16>(shared, global, 2 * valid DE_AT);
  } else if (vector == 4) {
    // Half of the chunks of 256 bytes copy their upper half first, or half the banks would idle.
    const int first = reinterpret_cast<uintptr_t>(shared) >> 7 & 1 ? 4 : 0, second = 4 - first;
    cp_async<8>(shared + 2 * first, global + first, 2 * min(max(valid - first, 0), 4) DE_AT);
    cp_async<8>(shared + 2 * second, global + second, 2 * min(max(valid - second, 0), 4) DE_AT);
  } else {
#pragma unroll 1
    for (int c = 0; c < kChunk; ++c)
      shared_store<uint16_t>(
          shared + 2 * c, c < valid ? global_load<uint16_t>(global + c DE_AT) : uint16_t(0) DE_AT);
  }
}

// Four channels, of which the first `valid` are read; the others are zero.
template <typename T>
__device__ __forceinline__ uint2 load_half(const T* global, int valid, int vector DE_HERE) {
  if (vector >= 4 && valid >= 4) return global_load<uint2>(global DE_AT);
  uint64_t bits = 0;
#pragma unroll 1
  for (int c = 0; c < 4 && c < valid; ++c)
    bits |= uint64_t(global_load<uint16_t>(global + c DE_AT)) << (16 * c);
  return uint2{static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32)};
}

// The first `valid` channels of a chunk in registers, zero behind them.
template <typename T>
__device__ __forceinline__ uint4 load_chunk(const T* global, int valid, int vector DE_HERE) {
  if (vector == 8 && valid == kChunk) return global_load<uint4>(global DE_AT);
  const uint2 low = load_half(global, valid, vector DE_AT);
  const uint2 high = load_half(global + 4, valid - 4, vector DE_AT);
  return uint4{low.x, low.y, high.x, high.y};
}

// Writes the first `valid` of four channels.
template <typename T>
__device__ __forceinline__ void store_half(T* global, uint2 half, int valid, int vector DE_HERE) {
  if (vector >= 4 && valid >= 4) {
    global_store(global, half DE_AT);
    return;
  }
  const uint64_t bits = half.x | uint64_t(half.y) << 32;
#pragma unroll 1
  for (int c = 0; c < 4 && c < valid; ++c)
    global_store(global + c, static_cast<uint16_t>(bits >> (16 * c)) DE_AT);
}

// Writes the first `valid` channels of a chunk.
template <typename T>
__device__ __forceinline__ void store_chunk(T* global, uint4 chunk, int valid, int vector DE_HERE) {
  if (vector == 8 && valid == kChunk) {
    global_store(global, chunk DE_AT);
    return;
  }
  store_half(global, uint2{chunk.x, chunk.y}, valid, vector DE_AT);
  store_half(global + 4, uint2{chunk.z, chunk.w}, valid - 4, vector DE_AT);
}

__device__ __forceinline__ void to_array(uint4 chunk, uint32_t (&pairs)[4]) {
  pairs[0] = chunk.x;
  pairs[1] = chunk.y;
  pairs[2] = chunk.z;
  pairs[3] = chunk.w;
}

// ---- Norms --------------------------------------------------------------------------------------

// Two channels' scale and shift, as (a0, s0, a1, s1).
template <typename T>
__device__ __forceinline__ uint32_t norm_relu_pair(uint32_t pair, float4 norm) {
  const float2 x = unpack<T>(pair);
  return pack_relu<T>(normalise(x.x, norm.x, norm.y), normalise(x.y, norm.z, norm.w));
}

// Scale and shift of a panel's channels in shared memory, a pair per channel; 16-byte pieces of the
// last two chunks change places, so that four threads at the heads of the chunks meet no bank
// twice.
constexpr int kScaleShiftBytes = 2 * kPanelChannels * 4;
__device__ __forceinline__ int scale_shift_offset(int channel) {
  return (8 * channel) ^ (channel & 16);
}

// Channels past the end get zeros, which make zeros of whatever they meet.
__device__ __forceinline__ void copy_scale_shift(unsigned char* shared, Table norm, int channel,
                                                 int channels, int threads) {
  for (int i = thread_index(); i < 2 * kPanelChannels; i += threads) {
    const int row = i & 1, c = i >> 1;
    const bool exists = channel + c < channels;
    cp_async<4>(shared + scale_shift_offset(c) + 4 * row,
                norm.data + (exists ? (kScale + row) * norm.stride + channel + c : 0),
                exists ? 4 : 0);
  }
}

// All four rows of a norm for a panel's channels, as [32][4].
__device__ __forceinline__ void copy_norm(unsigned char* shared, Table norm, int channel,
                                          int channels, int threads) {
  for (int i = thread_index(); i < kNormRows * kPanelChannels; i += threads) {
    const int row = i % kNormRows, c = i / kNormRows;
    const bool exists = channel + c < channels;
    cp_async<4>(shared + 4 * i, norm.data + (exists ? row * norm.stride + channel + c : 0),
                exists ? 4 : 0);
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

// Normalises one chunk of each of a panel's rows in place: chunk thread % 4 of every
// (threads / 4)-th row.
template <typename T>
__device__ __forceinline__ void normalise_panel(unsigned char* panel, const unsigned char* norm,
                                                int rows, int threads) {
  const int chunk = thread_index() & 3;
  float4 pairs[4];
#pragma unroll
  for (int i = 0; i < 4; ++i)
    pairs[i] = shared_load<float4>(norm + scale_shift_offset(chunk * kChunk + 2 * i));
  for (int row = thread_index() >> 2; row < rows; row += threads >> 2) {
    unsigned char* at = panel + panel_offset(row, chunk);
    uint4 v = shared_load<uint4>(at);
    v.x = norm_relu_pair<T>(v.x, pairs[0]);
    v.y = norm_relu_pair<T>(v.y, pairs[1]);
    v.z = norm_relu_pair<T>(v.z, pairs[2]);
    v.w = norm_relu_pair<T>(v.w, pairs[3]);
    shared_store(at, v);
  }
}

// ---- Tensor-core operands from panels -----------------------------------------------------------

// Where a lane points ldmatrix for a 16 x 16 operand whose rows are the panel's rows (A, not
// transposed; B transposed has the same form with two 8-column tiles in a chunk pair).
__device__ __forceinline__ int a_row(int lane) { return lane & 15; }
__device__ __forceinline__ int a_chunk(int lane) { return lane >> 4; }
// For two 8-column tiles of B whose columns are the panel's rows and whose depth is its channels.
__device__ __forceinline__ int b_row(int lane) { return (lane & 7) | ((lane >> 1) & 8); }
__device__ __forceinline__ int b_chunk(int lane) { return (lane >> 3) & 1; }
// Transposed: depth runs along the panel's rows. As A its rows are the panel's channels, and the
// lanes point as for B above; as B its columns are the panel's channels, and they point as for A.

// ---- Output -------------------------------------------------------------------------------------

// Running moments of the columns that a warp writes, in shared memory: mean [columns], M2
// [columns].
struct WarpMoments {
  float* mean;
  float* m2;
  float count;  // rows seen, the same for all columns
};

// Takes 32 rows of one panel of rounded outputs into the moments. Each lane holds 16 rows of two
// neighbouring columns in registers: exact two-pass moments, then two merges in a fixed order.
template <typename T>
__device__ __forceinline__ void measure_panel(const unsigned char* staging, int lane,
                                              uint32_t valid_rows, int column, int columns,
                                              float count, float* mean, float* m2) {
  const int pair = lane & 15, parity = lane >> 4;
  // The chunks of rows 2 i and 2 i + 1 lie in the order i % 4.
  const int own = parity * kPanelRowBytes + 4 * pair;
  uint32_t values[16];
#pragma unroll
  for (int i = 0; i < 16; ++i)
    values[i] = shared_load<uint32_t>(staging + 2 * i * kPanelRowBytes + (own ^ ((i & 3) << 4)));
  const uint32_t rows = valid_rows >> parity;
  Moments<float> low{0, 0, 0}, high{0, 0, 0};
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const float2 v = unpack<T>(values[i]);
    const bool valid = (rows >> (2 * i)) & 1;
    low.mean += valid ? v.x : 0.0f;
    high.mean += valid ? v.y : 0.0f;
    low.count += valid ? 1.0f : 0.0f;
  }
  high.count = low.count;
  const float share = low.count > 0.0f ? 1.0f / low.count : 0.0f;
  low.mean *= share;
  high.mean *= share;
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const float2 v = unpack<T>(values[i]);
    const bool valid = (rows >> (2 * i)) & 1;
    const float x = valid ? v.x - low.mean : 0.0f, y = valid ? v.y - high.mean : 0.0f;
    low.m2 += x * x;
    high.m2 += y * y;
  }
  // Lanes of even rows finish the pair's first column, lanes of odd rows its second.
  const Moments<float> give = parity ? low : high, keep = parity ? high : low;
  const Moments<float> got{shuffle_xor(give.count, 16), shuffle_xor(give.mean, 16),
                           shuffle_xor(give.m2, 16)};
  const Moments<float> both = parity ? merge(got, keep) : merge(keep, got);
  const int c = column + 2 * pair + parity;
  if (c >= columns) return;
  const Moments<float> all =
      merge(Moments<float>{count, shared_load<float>(mean + c), shared_load<float>(m2 + c)}, both);
  shared_store(mean + c, all.mean);
  shared_store(m2 + c, all.m2);
}

// Rounds 32 rows of a warp's accumulators, takes their moments (if asked) and writes them to y.
// `staging` is 2 KB of the warp's own; row_of(r) is the global row of the warp's row r, negative
// where there is none; columns [column, columns) of y and of the moments are the accumulators'.
template <typename T, int kTiles, typename RowOf>
__device__ __forceinline__ void write_rows(float (*acc)[kTiles][4], unsigned char* staging,
                                           const RowTensor& y, int column, int columns,
                                           bool measure, WarpMoments& moments, RowOf row_of) {
  // Through a shuffle, so that no address made of it is kept in registers during the product.
  const int lane = shuffle(lane_index(), lane_index()), g = lane >> 2, t = lane & 3;
  const uint32_t valid_rows = ballot(row_of(lane) >= 0);
  const int accumulator = panel_offset(g, 0) + 4 * t, chunk = panel_offset(g, t);
#pragma unroll
  for (int panel = 0; panel < (kTiles + 3) / 4; ++panel) {
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int tile = 4 * panel + j;
        if (tile >= kTiles) break;
        const float (&d)[4] = acc[m][tile];
        unsigned char* to = staging + 16 * m * kPanelRowBytes + (accumulator ^ (16 * j));
        shared_store(to, pack<T>(d[0], d[1]));
        shared_store(to + 8 * kPanelRowBytes, pack<T>(d[2], d[3]));
      }
    }
    sync_warp();
    const int first = column + panel * kPanelChannels;
    if (measure)
      measure_panel<T>(staging, lane, valid_rows, panel * kPanelChannels, columns - column,
                       moments.count, moments.mean, moments.m2);
    const int valid = channels_left(first + t * kChunk, columns);
#pragma unroll 1  // addresses of every row at once would not fit beside the accumulators
    for (int i = 0; i < 4; ++i) {
      const int64_t global_row = row_of(g + 8 * i);
      if (global_row >= 0 && valid > 0)
        store_chunk(y.at<T>(global_row, first + t * kChunk),
                    shared_load<uint4>(staging + chunk + 8 * i * kPanelRowBytes), valid, y.vector);
    }
    sync_warp();
  }
  for (uint32_t bits = valid_rows; bits; bits &= bits - 1) moments.count += 1.0f;
}

}  // namespace densenet_efficient::device
