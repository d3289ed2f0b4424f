// How a warp's accumulators leave: rounded, through shared memory, into rows of the output and into
// the moments of its columns.
#pragma once

#include "panel.cuh"

namespace densenet_efficient::device {

// Of eight values of each lane, added up over the eight lanes that are alike modulo four, the one
// whose number is lane / 4: in seven shuffles, where all of them in every lane would take 24.
__device__ __forceinline__ float share_of_sums(const float (&values)[8], int lane) {
  const auto exchange = [lane](float lower, float upper, int mask) {
    const bool keeps_upper = lane & mask;
    return (keeps_upper ? upper : lower) + shuffle_xor(keeps_upper ? lower : upper, mask);
  };
  float four[4], two[2];
#pragma unroll
  for (int i = 0; i < 4; ++i) four[i] = exchange(values[i], values[i + 4], 16);
#pragma unroll
  for (int i = 0; i < 2; ++i) two[i] = exchange(four[i], four[i + 2], 8);
  return exchange(two[0], two[1], 4);
}

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
  // [column0, outputs) to the block's partial [3, outputs]: count, mean, M2. Of the block's
  // `others` each has moments of no columns.
  template <int kSplit>
  __device__ __forceinline__ void finish(const WarpMoments& own, int warps, float* partial,
                                         int column0, int outputs, int others = 0) const {
    if (own.m2 && lane_index() == 0) shared_store(own.m2 + kColumns, own.count);
    sync_threads();
    for (int c = thread_index(); c < kColumns * kSplit && column0 + c < outputs;
         c += 32 * (warps + others)) {
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

// How the moments of a warp's 32 rows are merged: the same for all columns, so that it is divided
// once. A lane measures every other row of its columns, `parity` the first.
struct RowCounts {
  uint32_t valid;            // bit r: whether row r is one
  float taken;               // rows of the lane's parity
  float reciprocal;          // 1 / taken
  float even, odd_share;     // rows of even number; the others' share of all
  float before, tile_share;  // rows in front of these; these rows' share of all

  __device__ __forceinline__ RowCounts(uint32_t valid, int lane, float before)
      : valid(valid), before(before) {
    constexpr uint32_t kEven = 0x55555555u;
    even = static_cast<float>(population(valid & kEven));
    const float odd = static_cast<float>(population(valid & ~kEven)), all = even + odd;
    taken = lane >> 4 ? odd : even;
    reciprocal = taken > 0.0f ? 1.0f / taken : 0.0f;
    odd_share = all > 0.0f ? odd / all : 0.0f;
    tile_share = all > 0.0f ? all / (before + all) : 0.0f;
  }
};

// merge() of norm_relu.h with the right side's share known; left_count rows on the left.
__device__ __forceinline__ float2 merge_shared(float2 left, float2 right, float left_count,
                                               float share) {
  const float delta = right.x - left.x;
  return float2{left.x + delta * share, left.y + right.y + delta * delta * left_count * share};
}

// Takes 32 rows of one panel of rounded outputs into the moments. Each lane holds 16 rows of the
// columns of one word in registers: exact two-pass moments, then two merges in a fixed order. Where
// rows are missing it goes over shared memory again, row by row, in the same order.
template <typename T>
__device__ __forceinline__ void measure_panel(const unsigned char* staging, int lane,
                                              const RowCounts& rows, int column, int columns,
                                              float* mean, float* m2) {
  constexpr int kWidth = kOperandChannels<T>;
  const int word = lane & 15, parity = lane >> 4;
  const int own = parity * kPanelRowBytes + 4 * word;
  const auto word_of = [&](int i) {
    return shared_load<uint32_t>(staging + 2 * i * kPanelRowBytes + (own ^ row_swizzle<T>(2 * i)));
  };
  float means[kWidth] = {}, m2s[kWidth] = {}, values[kWidth];
  const auto add = [&](uint32_t bits) {
    unpack_operand<T>(bits, values);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) means[k] += values[k];
  };
  const auto add_square = [&](uint32_t bits) {
    unpack_operand<T>(bits, values);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      const float x = values[k] - means[k];
      m2s[k] += x * x;
    }
  };
  const auto divide = [&] {
#pragma unroll
    for (int k = 0; k < kWidth; ++k) means[k] *= rows.reciprocal;
  };
  if (rows.valid == 0xffffffffu) {
    uint32_t words[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) words[i] = word_of(i);
#pragma unroll
    for (int i = 0; i < 16; ++i) add(words[i]);
    divide();
#pragma unroll
    for (int i = 0; i < 16; ++i) add_square(words[i]);
  } else {
    const uint32_t valid = rows.valid >> parity;
#pragma unroll 1
    for (int i = 0; i < 16; ++i)
      if (valid >> (2 * i) & 1) add(word_of(i));
    divide();
#pragma unroll 1
    for (int i = 0; i < 16; ++i)
      if (valid >> (2 * i) & 1) add_square(word_of(i));
  }
  // Of two columns lanes of even rows finish the first one, lanes of odd rows the second.
  const int kept = kWidth > 1 ? parity : 0, given = kWidth > 1 ? 1 - parity : 0;
  const float2 keep{kept ? means[kWidth - 1] : means[0], kept ? m2s[kWidth - 1] : m2s[0]};
  const float2 got{shuffle_xor(given ? means[kWidth - 1] : means[0], 16),
                   shuffle_xor(given ? m2s[kWidth - 1] : m2s[0], 16)};
  const float2 both =
      merge_shared(parity ? got : keep, parity ? keep : got, rows.even, rows.odd_share);
  const int c = column + kWidth * word + kept;
  if (c >= columns || (kWidth == 1 && parity)) return;
  const float2 all = merge_shared(float2{shared_load<float>(mean + c), shared_load<float>(m2 + c)},
                                  both, rows.before, rows.tile_share);
  shared_store(mean + c, all.x);
  shared_store(m2 + c, all.y);
}

using tiling::kStagingBytes;

// Rounds 32 rows of a warp's accumulators, takes their moments (if asked) and writes them to y.
// `staging` is kStagingBytes of its own; offset_of(r) is the place of the warp's row r, rows after
// y's row `first_row`, negative where there is none; columns [column, columns) of y and of the
// moments are the accumulators'.
template <typename T, int kTiles, typename OffsetOf>
__device__ __forceinline__ void write_rows(float (*acc)[kTiles][4], unsigned char* staging,
                                           const RowTensor& y, int64_t first_row, int column,
                                           int columns, bool measure, WarpMoments& moments,
                                           OffsetOf offset_of) {
  // Through a shuffle, so that no address made of it is kept in registers during the product.
  const int lane = shuffle(lane_index(), lane_index()), g = lane >> 2, t = lane & 3;
  const RowCounts rows(ballot(offset_of(lane) >= 0), lane, moments.count);
  constexpr int kPanelTiles = kPanelChannels<T> / 8, kTileBytes = 8 * sizeof(T);
  const int accumulator = accumulator_offset<T>(lane), chunk = panel_offset<T>(g, t);
  const int pitch = static_cast<int>(y.stride) * static_cast<int>(sizeof(T));
  T* const to = y.at<T>(first_row, column + t * kChunk<T>);
#pragma unroll
  for (int panel = 0; panel < (kTiles + kPanelTiles - 1) / kPanelTiles; ++panel) {
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int j = 0; j < kPanelTiles; ++j) {
        const int tile = kPanelTiles * panel + j;
        if (tile >= kTiles) break;
        const float (&d)[4] = acc[m][tile];
        unsigned char* at = staging + 16 * m * kPanelRowBytes + (accumulator ^ (kTileBytes * j));
        shared_store(at, pack_two<T>(d[0], d[1]));
        shared_store(at + 8 * kPanelRowBytes, pack_two<T>(d[2], d[3]));
      }
    }
    sync_warp();
    const int first = panel * kPanelChannels<T>;
    if (measure)
      measure_panel<T>(staging, lane, rows, first, columns - column, moments.mean, moments.m2);
    const int left = columns - column - first - t * kChunk<T>;
    store_rows<T, 4>(
        to + first, pitch, left, y.vector, [&](int i) { return offset_of(g + 8 * i); },
        [&](int i) { return shared_load<uint4>(staging + chunk + 8 * i * kPanelRowBytes); });
    sync_warp();
  }
  moments.count += static_cast<float>(population(rows.valid));
}

}  // namespace densenet_efficient::device
