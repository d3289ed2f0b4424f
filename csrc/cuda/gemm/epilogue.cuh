// How a warp's accumulators leave: rounded, through shared memory, into rows of the output and into
// the moments of its columns.
#pragma once

#include "panel.cuh"

namespace densenet_efficient::device {

// Running moments of the columns that a warp writes, in shared memory: mean [columns], M2
// [columns].
struct WarpMoments {
  float* mean;
  float* m2;
  float count;  // rows seen, the same for all columns
};

// The same of all a block's warps, one after the other: mean [kColumns], M2 [kColumns], count.
template <int kColumns>
struct BlockMoments {
  static constexpr int kWarpBytes = tiling::warp_moment_bytes(kColumns), kPitch = kWarpBytes / 4;
  float* data;

  __device__ __forceinline__ explicit BlockMoments(unsigned char* shared)
      : data(reinterpret_cast<float*>(shared)) {}

  // A warp's own: of no rows yet.
  __device__ __forceinline__ WarpMoments start(int warp) const {
    float* const own = data + warp * kPitch;
    for (int c = lane_index(); c < 2 * kColumns; c += 32) shared_store(own + c, 0.0f);
    sync_warp();
    return {own, own + kColumns, 0.0f};
  }

  // Merges them in the warps' order, kSplit warps side by side, and writes those of the columns
  // [column0, outputs) to the block's partial [3, outputs]: count, mean, M2.
  template <int kSplit>
  __device__ __forceinline__ void finish(const WarpMoments& own, int warps, float* partial,
                                         int column0, int outputs) const {
    if (lane_index() == 0) shared_store(own.m2 + kColumns, own.count);
    sync_threads();
    for (int c = thread_index(); c < kColumns * kSplit && column0 + c < outputs; c += 32 * warps) {
      Moments<float> all{0, 0, 0};
      for (int warp = c / kColumns; warp < warps; warp += kSplit) {
        const float* of_warp = data + warp * kPitch;
        const float* mean = of_warp + c % kColumns;
        all = merge(all,
                    Moments<float>{shared_load<float>(of_warp + 2 * kColumns),
                                   shared_load<float>(mean), shared_load<float>(mean + kColumns)});
      }
      float* const out = partial + column0 + c;
      global_store(out, all.count);
      global_store(out + outputs, all.mean);
      global_store(out + 2 * outputs, all.m2);
    }
  }
};

// Takes 32 rows of one panel of rounded outputs into the moments. Each lane holds 16 rows of the
// columns of one word in registers: exact two-pass moments, then two merges in a fixed order.
template <typename T>
__device__ __forceinline__ void measure_panel(const unsigned char* staging, int lane,
                                              uint32_t valid_rows, int column, int columns,
                                              float count, float* mean, float* m2) {
  constexpr int kWidth = kOperandChannels<T>;
  const int word = lane & 15, parity = lane >> 4;
  const int own = parity * kPanelRowBytes + 4 * word;
  uint32_t words[16];
#pragma unroll
  for (int i = 0; i < 16; ++i)
    words[i] =
        shared_load<uint32_t>(staging + 2 * i * kPanelRowBytes + (own ^ row_swizzle<T>(2 * i)));
  const uint32_t rows = valid_rows >> parity;
  float taken = 0.0f, means[kWidth] = {}, m2s[kWidth] = {};
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    float values[kWidth];
    unpack_operand<T>(words[i], values);
    const bool valid = (rows >> (2 * i)) & 1;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) means[k] += valid ? values[k] : 0.0f;
    taken += valid ? 1.0f : 0.0f;
  }
  const float share = taken > 0.0f ? 1.0f / taken : 0.0f;
#pragma unroll
  for (int k = 0; k < kWidth; ++k) means[k] *= share;
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    float values[kWidth];
    unpack_operand<T>(words[i], values);
    const bool valid = (rows >> (2 * i)) & 1;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      const float x = valid ? values[k] - means[k] : 0.0f;
      m2s[k] += x * x;
    }
  }
  // Of two columns lanes of even rows finish the first one, lanes of odd rows the second.
  const int kept = kWidth > 1 ? parity : 0, given = kWidth > 1 ? 1 - parity : 0;
  const Moments<float> keep{taken, kept ? means[kWidth - 1] : means[0],
                            kept ? m2s[kWidth - 1] : m2s[0]};
  const Moments<float> got{shuffle_xor(taken, 16),
                           shuffle_xor(given ? means[kWidth - 1] : means[0], 16),
                           shuffle_xor(given ? m2s[kWidth - 1] : m2s[0], 16)};
  const Moments<float> both = parity ? merge(got, keep) : merge(keep, got);
  const int c = column + kWidth * word + kept;
  if (c >= columns || (kWidth == 1 && parity)) return;
  const Moments<float> all =
      merge(Moments<float>{count, shared_load<float>(mean + c), shared_load<float>(m2 + c)}, both);
  shared_store(mean + c, all.mean);
  shared_store(m2 + c, all.m2);
}

using tiling::kStagingBytes;

// Rounds 32 rows of a warp's accumulators, takes their moments (if asked) and writes them to y.
// `staging` is kStagingBytes of its own; row_of(r) is the global row of the warp's row r, negative
// where there is none; columns [column, columns) of y and of the moments are the accumulators'.
template <typename T, int kTiles, typename RowOf>
__device__ __forceinline__ void write_rows(float (*acc)[kTiles][4], unsigned char* staging,
                                           const RowTensor& y, int column, int columns,
                                           bool measure, WarpMoments& moments, RowOf row_of) {
  // Through a shuffle, so that no address made of it is kept in registers during the product.
  const int lane = shuffle(lane_index(), lane_index()), g = lane >> 2, t = lane & 3;
  const uint32_t valid_rows = ballot(row_of(lane) >= 0);
  constexpr int kPanelTiles = kPanelChannels<T> / 8, kTileBytes = 8 * sizeof(T);
  const int accumulator = accumulator_offset<T>(lane), chunk = panel_offset<T>(g, t);
#pragma unroll
  for (int panel = 0; panel < (kTiles + kPanelTiles - 1) / kPanelTiles; ++panel) {
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int j = 0; j < kPanelTiles; ++j) {
        const int tile = kPanelTiles * panel + j;
        if (tile >= kTiles) break;
        const float (&d)[4] = acc[m][tile];
        unsigned char* to = staging + 16 * m * kPanelRowBytes + (accumulator ^ (kTileBytes * j));
        shared_store(to, pack_two<T>(d[0], d[1]));
        shared_store(to + 8 * kPanelRowBytes, pack_two<T>(d[2], d[3]));
      }
    }
    sync_warp();
    const int first = column + panel * kPanelChannels<T>;
    if (measure)
      measure_panel<T>(staging, lane, valid_rows, panel * kPanelChannels<T>, columns - column,
                       moments.count, moments.mean, moments.m2);
    const int valid = channels_left<T>(first + t * kChunk<T>, columns);
#pragma unroll 1  // addresses of every row at once would not fit next to the accumulators
    for (int i = 0; i < 4; ++i) {
      const int64_t global_row = row_of(g + 8 * i);
      if (global_row >= 0 && valid > 0)
        store_chunk(y.at<T>(global_row, first + t * kChunk<T>),
                    shared_load<uint4>(staging + chunk + 8 * i * kPanelRowBytes), valid, y.vector);
    }
    sync_warp();
  }
  for (uint32_t bits = valid_rows; bits; bits &= bits - 1) moments.count += 1.0f;
}

}  // namespace densenet_efficient::device
