// The 1x1 convolution's backward, from the side of one warp: the 16 channels that it owns, with
// their columns of the weight, of dx, of the sums and of dweight. The operator is described in
// norm_relu_conv1x1_backward.cu.
#pragma once

#include "../gemm/row_tensor.h"
#include "../tiling/conv1x1.h"

namespace densenet_efficient::conv1x1_backward {

using Tiling = tiling::NormReluConv1x1Backward;

constexpr int kTileRows = Tiling::kTileRows;
constexpr int kPanelBytes = kTileRows * device::kPanelRowBytes;
constexpr int kMaxThreads = 128;

struct Backward {
  device::RowTensor dz_y, y;  // [M, K]
  device::Table correction;   // [4, K]
  device::RowTensor x;        // [M, C]
  device::Table norm;         // [4, C]
  device::RowTensor weight;   // [K, C]
  device::RowTensor dx;       // [M, C]
  float* partial;             // [row blocks, K + 2, pitch]: dweight, dgamma, dbeta
  int64_t pitch;              // channels of a partial row
  int64_t rows;               // M
  int channels, outputs;      // C, K
  int warps;                  // of a block
  int channel_blocks;         // blocks that share a range of rows
  bool weight_gradient;
};

// Rows of the norm that a tile needs: scale, shift, mean.
constexpr int kTileNormRows = kRstd;

// A stage: dz_y and y in panels of their K channels each, x and dx in panels of the warps'. Behind
// the stages the correction, [kChunk][(kOutputs + 8) / kChunk][4] (neighbouring threads own
// neighbouring chunks, and the channels of a chunk do not share banks), and the norm of the block's
// channels, [3][16 * warps].
template <typename T, int kOutputs>
struct BackwardLayout {
  static constexpr int kPanels = kOutputs / device::kPanelChannels<T>;
  // The widest kernels' third stage would not fit devices with 99 KB for a block.
  static constexpr int kStages = device::kIs16Bit<T> && kOutputs <= 128 ? 3 : 2;
  static constexpr int kCorrectionPitch = (kOutputs + 8) / device::kChunk<T> * 16;
  int warps;
  DE_HOST_DEVICE int y_offset() const { return kPanels * kPanelBytes; }
  DE_HOST_DEVICE int x_offset() const { return 2 * kPanels * kPanelBytes; }
  DE_HOST_DEVICE static int x_panels(int warps) {
    return device::kIs16Bit<T> ? (warps + 1) / 2 : warps;
  }
  DE_HOST_DEVICE int dx_offset() const { return x_offset() + x_panels(warps) * kPanelBytes; }
  DE_HOST_DEVICE int stage_bytes() const { return dx_offset() + x_panels(warps) * kPanelBytes; }
  DE_HOST_DEVICE int correction_offset() const { return kStages * stage_bytes(); }
  DE_HOST_DEVICE int norm_offset() const {
    return correction_offset() + device::kChunk<T> * kCorrectionPitch;
  }
  DE_HOST_DEVICE int shared_bytes() const { return norm_offset() + kTileNormRows * 16 * warps * 4; }
};

// A thread's chunks of dz_y and y: column `column_chunk` of every row_step-th row from `row` on, of
// which the first `rows` of a tile exist.
template <typename T, int kOutputs>
__device__ __forceinline__ void copy_gradient(unsigned char* stage, int y_offset,
                                              const Backward& args, int64_t row0, int rows, int row,
                                              int row_step, int column_chunk) {
  using namespace device;
  const int channel = column_chunk * kChunk<T>, valid = channels_left<T>(channel, args.outputs);
  unsigned char* const to = stage + column_chunk / 4 * kPanelBytes;
  const T* const dz_y = args.dz_y.at<T>(row0, channel);
  const T* const y = args.y.at<T>(row0, channel);
  const int dz_y_pitch = static_cast<int>(args.dz_y.stride) * static_cast<int>(sizeof(T));
  const int y_pitch = static_cast<int>(args.y.stride) * static_cast<int>(sizeof(T));
  const int exist = valid ? rows : 0;
  const bool whole =
      min(args.dz_y.vector, args.y.vector) == kChunk<T> && (valid == kChunk<T> || valid == 0);
  if (whole) {
    for (; row < exist; row += row_step) {
      const int offset = panel_offset<T>(row, column_chunk % 4);
      cp_async<16>(to + offset, advance(dz_y, row, dz_y_pitch));
      cp_async<16>(to + y_offset + offset, advance(y, row, y_pitch));
    }
#pragma unroll 1
    for (; row < kTileRows; row += row_step) {
      const int offset = panel_offset<T>(row, column_chunk % 4);
      shared_store(to + offset, uint4{0, 0, 0, 0});
      shared_store(to + y_offset + offset, uint4{0, 0, 0, 0});
    }
    return;
  }
#pragma unroll 1
  for (; row < kTileRows; row += row_step) {
    const int offset = panel_offset<T>(row, column_chunk % 4), here = row < exist ? valid : 0;
    copy_chunk(to + offset, advance(dz_y, row, dz_y_pitch), here, args.dz_y.vector);
    copy_chunk(to + y_offset + offset, advance(y, row, y_pitch), here, args.y.vector);
  }
}

// dy over dz_y, in place: each thread works on the chunks that it copied itself, all of them of the
// same columns.
template <typename T, int kOutputs>
__device__ __forceinline__ void form_dy(unsigned char* stage, int y_offset,
                                        const unsigned char* correction, int row_step, int row,
                                        int column_chunk, int valid_rows) {
  using namespace device;
  using Layout = BackwardLayout<T, kOutputs>;
  const int panel = column_chunk / 4 * kPanelBytes, chunk = column_chunk % 4;
  float4 entries[4][kOperandChannels<T>];
#pragma unroll
  for (int i = 0; i < kChunk<T>; ++i)
    entries[i / kOperandChannels<T>][i % kOperandChannels<T>] =
        shared_load<float4>(correction + i * Layout::kCorrectionPitch + 16 * column_chunk);
  for (; row < kTileRows; row += row_step) {
    const int offset = panel + panel_offset<T>(row, chunk);
    uint32_t dz[4], y[4];
    to_array(shared_load<uint4>(stage + offset), dz);
    to_array(shared_load<uint4>(stage + y_offset + offset), y);
    uint32_t dy[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) dy[i] = correct_operand<T>(dz[i], y[i], entries[i]);
    shared_store(stage + offset,
                 row < valid_rows ? uint4{dy[0], dy[1], dy[2], dy[3]} : uint4{0, 0, 0, 0});
  }
}

// The warp's 16 channels and what it keeps of them in registers. The data gradient's two 8-column
// tiles are spread so that a lane holds four neighbouring channels, 4 t to 4 t + 3 of the warp's:
// tile j, column 2 t + e is channel 4 t + 2 j + e. The weight gradient's tiles lie in channel
// order.
template <typename T, int kOutputs>
struct WarpChannels {
  static constexpr int kSteps = kOutputs / device::kDepth<T>;  // of the data gradient's depth
  static constexpr int kRows = kOutputs / 16;                  // of dweight's tiles
  const float* norm;  // in shared memory, at the warp's first channel
  int norm_pitch;     // between its rows
  int channel0;       // of the warp
  uint32_t weight[kSteps][2][2];
  float dgamma[4], dbeta[4];  // of the lane's four channels
  float dweight[kRows][2][4];

  __device__ __forceinline__ WarpChannels(const Backward& args, const float* norm, int channel0)
      : norm(norm), norm_pitch(16 * args.warps), channel0(channel0) {
    using namespace device;
    const int lane = lane_index(), g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int i = 0; i < 4; ++i) dgamma[i] = dbeta[i] = 0.0f;
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) dweight[m][j][i] = 0.0f;
      }
    }
    // Column g of tile j is channel 4 (g / 2) + 2 j + g % 2: both tiles come with four channels.
    const int channel = channel0 + 4 * (g >> 1);
    const auto four = [&](int row) {
      const int left = row < args.outputs ? channels_left<T>(channel, args.channels) : 0;
      return load_four(args.weight.at<T>(row, channel), left, args.weight.vector);
    };
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = kDepth<T> * k + kDepth<T> / 2 * half + kOperandChannels<T> * t;
        if constexpr (kIs16Bit<T>) {
          const uint2 even = four(row), odd = four(row + 1);
          const int shift = 16 * (g & 1);
          weight[k][0][half] = ((even.x >> shift) & 0xffffu) | ((odd.x >> shift) & 0xffffu) << 16;
          weight[k][1][half] = ((even.y >> shift) & 0xffffu) | ((odd.y >> shift) & 0xffffu) << 16;
        } else {
          const uint4 row_words = four(row);
          weight[k][0][half] = round_operand<T>(g & 1 ? row_words.y : row_words.x);
          weight[k][1][half] = round_operand<T>(g & 1 ? row_words.w : row_words.z);
        }
      }
    }
  }

  // The tile's row that the data gradient's product takes as its row r: bits 1 and 2 change places,
  // so that the rows of lanes 0 to 15 do not share banks when x and dx are read 8 bytes at a time.
  __device__ __forceinline__ static int spread(int r) {
    return (r & 9) | ((r & 2) << 1) | ((r & 4) >> 1);
  }

  // Four neighbouring channels of one row of the norm.
  __device__ __forceinline__ void load_norm(NormRow row, float (&values)[4]) const {
    const float4 four =
        device::shared_load<float4>(norm + row * norm_pitch + 4 * (device::lane_index() & 3));
    values[0] = four.x;
    values[1] = four.y;
    values[2] = four.z;
    values[3] = four.w;
  }

  // The data gradient of 16 rows: product, mask, sums, dx. `x` and `dx` are the stage's panels at
  // the warp's channels; global_dx is the row of the lane's first row.
  __device__ __forceinline__ void data_gradient(const unsigned char* dy, const unsigned char* x,
                                                const unsigned char* dx, int chunk0, int tile_row,
                                                int valid_rows, const Backward& args,
                                                int64_t row0) {
    using namespace device;
    const int lane = lane_index(), g = lane >> 2, t = lane & 3;
    const int a_offset = panel_offset<T>(tile_row + spread(a_row(lane)), a_chunk(lane));
    float acc[2][4] = {};
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      uint32_t left[4];
      ldmatrix_x4(left, dy + k / 2 * kPanelBytes + (a_offset ^ (32 * (k % 2))));
      multiply_add<T>(acc[0], left, weight[k][0]);
      multiply_add<T>(acc[1], left, weight[k][1]);
    }
    float a[4], s[4], mean[4];
    load_norm(kScale, a);
    load_norm(kShift, s);
    load_norm(kMean, mean);
    const int first = channel0 + 4 * t;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = tile_row + spread(g) + 8 * half;
      const int offset = byte_offset<T>(row, chunk0, 4 * static_cast<int>(sizeof(T)) * t);
      float values[4], sum[4];
      unpack_four<T>(shared_load<Four<T>>(x + offset), values);
      unpack_four<T>(shared_load<Four<T>>(dx + offset), sum);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        // Lane t holds channel 4 t + i in tile i / 2, column 2 t + i % 2.
        const float dz =
            relu_mask(acc[i >> 1][2 * half + (i & 1)], normalise(values[i], a[i], s[i]));
        dgamma[i] += dz * (values[i] - mean[i]);
        dbeta[i] += dz;
        sum[i] += a[i] * dz;
      }
      if (row >= valid_rows) continue;
      store_four(args.dx.at<T>(row0 + row, first), pack_four<T>(sum),
                 channels_left<T>(first, args.channels), args.dx.vector);
    }
  }

  // dweight += dy^T @ relu(a * x + s) over one depth of rows.
  __device__ __forceinline__ void weight_gradient(const unsigned char* dy, const unsigned char* x,
                                                  int chunk0, int tile_row) {
    using namespace device;
    const int lane = lane_index();
    int of_x[kPointers<T>], of_dy[kPointers<T>];
#pragma unroll
    for (int i = 0; i < kPointers<T>; ++i) {
      of_x[i] = byte_offset<T>(tile_row + b_depth<T>(lane, i), chunk0, b_byte<T>(lane));
      of_dy[i] = byte_offset<T>(tile_row + a_depth<T>(lane, i), 0, a_byte<T>(lane));
    }
    uint32_t h[4];
    load_b_transposed<T>(h, x, of_x, 0);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* of_channel = norm + 8 * (i >> 1) + (lane >> 2);
      const float scale = shared_load<float>(of_channel + kScale * norm_pitch);
      const float shift = shared_load<float>(of_channel + kShift * norm_pitch);
      h[i] = norm_relu_operand<T>(h[i], same_norm<T>(scale, shift));
    }
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
      uint32_t outputs[4];
      load_a_transposed<T>(outputs, dy + sixteen_offset<T>(m, kPanelBytes), of_dy,
                           sixteen_swizzle<T>(m));
      multiply_add_pair<T>(dweight[m][0], dweight[m][1], outputs, h);
    }
  }

  // To the block's partial [K + 2, pitch] at the warp's channels.
  __device__ __forceinline__ void write(const Backward& args, float* partial) {
    using namespace device;
    const int lane = lane_index(), g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int mask = 4; mask < 32; mask *= 2) {
        dgamma[i] += shuffle_xor(dgamma[i], mask);
        dbeta[i] += shuffle_xor(dbeta[i], mask);
      }
    }
    if (g == 0) {
      float rstd[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int channel = channel0 + 4 * t + i;
        rstd[i] = channel < args.channels
                      ? global_load<float>(args.norm.data + kRstd * args.norm.stride + channel)
                      : 0.0f;
      }
      float* sums = partial + args.outputs * args.pitch + channel0 + 4 * t;
      global_store(sums, float4{dgamma[0] * rstd[0], dgamma[1] * rstd[1], dgamma[2] * rstd[2],
                                dgamma[3] * rstd[3]});
      global_store(sums + args.pitch, float4{dbeta[0], dbeta[1], dbeta[2], dbeta[3]});
    }
    if (!args.weight_gradient) return;
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = 16 * m + 8 * half + g;
          if (row < args.outputs)
            global_store(partial + row * args.pitch + channel0 + 8 * j + 2 * t,
                         float2{dweight[m][j][2 * half], dweight[m][j][2 * half + 1]});
        }
      }
    }
  }
};

}  // namespace densenet_efficient::conv1x1_backward
