// The 1x1 convolution's backward, from the side of one warp: the 16 channels that it owns, with
// their columns of the weight, of dx, of the sums and of dweight. The operator is described in
// norm_relu_conv1x1_backward.cu.
#pragma once

#include "backward_tiles.cuh"

namespace densenet_efficient::conv1x1_backward {

// Which row of sixteen the weight gradient takes r-th: that of the data gradient for 16-bit types.
template <typename T>
__device__ __forceinline__ int weight_row(int r) {
  return device::kIs16Bit<T> ? spread(r) : r;
}

// The warp's 16 channels and what it keeps of them in registers. The data gradient's two 8-column
// tiles are spread so that a lane holds four neighbouring channels, 4 t to 4 t + 3 of the warp's:
// tile j, column 2 t + e is channel 4 t + 2 j + e. Those of the weight gradient are spread in the
// same way for 16-bit types, whose operand of x is the data gradient's, transposed, and lie in
// channel order for 32-bit ones.
template <typename T, int kOutputs>
struct WarpChannels {
  static constexpr int kSteps = kOutputs / device::kDepth<T>;  // of the data gradient's depth
  static constexpr int kRows = kOutputs / 16;                  // of dweight's tiles
  const float* norm;  // in shared memory, at the warp's first channel
  int norm_pitch;     // between its rows
  int channel0;       // of the warp
  // Where the lane's operands and accumulators of the first rows lie in the panels.
  int of_product, of_channels, of_dy[device::kPointers<T>], of_x[device::kPointers<T>];
  unsigned char* dx;  // the lane's four channels of its first row in the tile
  int lane_row;       // the tile's row that is its first; past the tile where it has no channels
  bool whole;         // all of the warp's channels exist
  uint32_t weight[kSteps][2][2];
  float dgamma[4], dbeta[4];  // of the lane's four channels
  float dweight[kRows][2][4];

  __device__ __forceinline__ WarpChannels(const Backward& args, const float* norm, int channel0,
                                          int64_t row0)
      : norm(norm), norm_pitch(16 * args.warps), channel0(channel0) {
    using namespace device;
    const int lane = lane_index(), warp = warp_index(), g = lane >> 2, t = lane & 3;
    const int panel = sixteen_offset<T>(warp, kPanelBytes), chunk0 = sixteen_swizzle<T>(warp) / 16;
    of_product = panel_offset<T>(spread(a_row(lane)), a_chunk(lane));
    of_channels = panel + byte_offset<T>(spread(g), chunk0, 4 * static_cast<int>(sizeof(T)) * t);
#pragma unroll
    for (int i = 0; i < kPointers<T>; ++i) {
      of_dy[i] = byte_offset<T>(weight_row<T>(a_depth<T>(lane, i)), 0, a_byte<T>(lane));
      of_x[i] = panel + byte_offset<T>(b_depth<T>(lane, i), chunk0, b_byte<T>(lane));
    }
    of_product = kept(of_product);
    of_channels = kept(of_channels);
    of_dy[0] = kept(of_dy[0]);
    if constexpr (!kIs16Bit<T>) of_x[0] = kept(of_x[0]);
    const int first = channel0 + 4 * t;
    dx = reinterpret_cast<unsigned char*>(args.dx.at<T>(row0 + spread(g), first));
    lane_row = first < args.channels ? spread(g) : kTileRows;
    lane_row = kept(lane_row);
    whole = channel0 + 16 <= args.channels;
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
    // Outputs past the end have no dy: any row of the weight serves.
    const int left = args.outputs ? args.channels - channel : 0, last = args.outputs - 1;
    const int pitch = static_cast<int>(args.weight.stride) * static_cast<int>(sizeof(T));
    const T* const rows = args.weight.at<T>(0, channel);
    if (last == kOutputs - 1 && left >= 4 && args.weight.vector >= 4) {
      const T* const first_row = advance(rows, kOperandChannels<T> * t, pitch);
      load_weight([&](int row) { return global_load<Four<T>>(advance(first_row, row, pitch)); });
    } else {
      load_weight([&](int row) {
        row = min(row + kOperandChannels<T> * t, last);
        return load_four(advance(rows, row, pitch), left, args.weight.vector);
      });
    }
  }

  // Operands of the weight, of which four(row) gives four channels of the lane's row `row`.
  template <typename FourOf>
  __device__ __forceinline__ void load_weight(FourOf four) {
    using namespace device;
    const int odd_column = lane_index() >> 2 & 1;
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = kDepth<T> * k + kDepth<T> / 2 * half;
        if constexpr (kIs16Bit<T>) {
          const uint2 even = four(row), odd = four(row + 1);
          weight[k][0][half] = same_half(even.x, odd.x, odd_column);
          weight[k][1][half] = same_half(even.y, odd.y, odd_column);
        } else {
          const uint4 row_words = four(row);
          weight[k][0][half] = round_operand<T>(odd_column ? row_words.y : row_words.x);
          weight[k][1][half] = round_operand<T>(odd_column ? row_words.w : row_words.z);
        }
      }
    }
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

  // The data gradient of 16 of the tile's rows: product, mask, sums, dx. The product takes the rows
  // in the order of `spread`. From the lane's first row on `rows` exist. kWhole: all of them and of
  // the channels, aligned.
  template <bool kWhole>
  __device__ __forceinline__ void data_gradient(const unsigned char* stage, const Layout& layout,
                                                int tile_row, int rows, const Backward& args,
                                                uint32_t (&h)[4]) {
    using namespace device;
    const unsigned char* const dy = stage + tile_row * kPanelRowBytes;
    float acc[2][4] = {};
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      uint32_t left[4];
      ldmatrix_x4(left, dy + k / 2 * kPanelBytes + (of_product ^ (32 * (k % 2))));
      multiply_add<T>(acc[0], left, weight[k][0]);
      multiply_add<T>(acc[1], left, weight[k][1]);
    }
    float a[4], s[4], mean[4];
    load_norm(kScale, a);
    load_norm(kShift, s);
    load_norm(kMean, mean);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const unsigned char* const own = stage + of_channels + (tile_row + 8 * half) * kPanelRowBytes;
      float values[4], sum[4], z[4];
      unpack_four<T>(shared_load<Four<T>>(own + layout.x_offset()), values);
      unpack_four<T>(shared_load<Four<T>>(own + args.dx_offset), sum);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        // Lane t holds channel 4 t + i in tile i / 2, column 2 t + i % 2.
        z[i] = normalise(values[i], a[i], s[i]);
        const float dz = acc[i >> 1][2 * half + (i & 1)], centred = values[i] - mean[i];
        if (!relu_blocks(z[i])) {
          dgamma[i] += dz * centred;
          dbeta[i] += dz;
          sum[i] += a[i] * dz;
        }
      }
      if constexpr (kIs16Bit<T>) {
#pragma unroll
        for (int j = 0; j < 2; ++j)
          h[2 * j + half] = transpose_8x8(pack_relu<T>(z[2 * j], z[2 * j + 1]));
      }
      if (!kWhole && tile_row + 8 * half >= rows) continue;
      unsigned char* const to = advance(dx, tile_row + 8 * half, args.pitch);
      if constexpr (kWhole)
        global_store(to, pack_four<T>(sum));
      else
        store_four(reinterpret_cast<T*>(to), pack_four<T>(sum),
                   args.channels - channel0 - 4 * (lane_index() & 3), args.dx.vector);
    }
  }

  // dweight += dy^T @ relu(a * x + s) over 16 of the tile's rows; h: its operand, of 16-bit types.
  __device__ __forceinline__ void weight_gradient(const unsigned char* stage, const Layout& layout,
                                                  int tile_row, uint32_t (&h)[4]) {
    using namespace device;
#pragma unroll
    for (int depth = 0; depth < 16; depth += kDepth<T>) {
      const unsigned char* const dy = stage + (tile_row + depth) * kPanelRowBytes;
      if constexpr (!kIs16Bit<T>) {
        load_b_transposed<T>(h, dy + layout.x_offset(), of_x, 0);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* of_channel = norm + 8 * (i >> 1) + (lane_index() >> 2);
          h[i] = norm_relu_operand<T>(
              h[i], same_norm<T>(shared_load<float>(of_channel + kScale * norm_pitch),
                                 shared_load<float>(of_channel + kShift * norm_pitch)));
        }
      }
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
        uint32_t outputs[4];
        load_a_transposed<T>(outputs, dy + sixteen_offset<T>(m, kPanelBytes), of_dy,
                             sixteen_swizzle<T>(m));
        multiply_add_pair<T>(dweight[m][0], dweight[m][1], outputs, h);
      }
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
      float* sums = partial + args.outputs * args.partial_pitch + channel0 + 4 * t;
      global_store(sums, float4{dgamma[0] * rstd[0], dgamma[1] * rstd[1], dgamma[2] * rstd[2],
                                dgamma[3] * rstd[3]});
      global_store(sums + args.partial_pitch, float4{dbeta[0], dbeta[1], dbeta[2], dbeta[3]});
    }
    if (!args.weight_gradient) return;
    const int pitch = static_cast<int>(args.partial_pitch) * static_cast<int>(sizeof(float));
    float* const first = partial + channel0 + (kIs16Bit<T> ? 4 : 2) * t;
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = 16 * m + 8 * half + g;
        if (row >= args.outputs) continue;
        const float (&left)[4] = dweight[m][0], (&right)[4] = dweight[m][1];
        const int i = 2 * half;
        float* const to = advance(first, row, pitch);
        if constexpr (kIs16Bit<T>) {
          global_store(to, float4{left[i], left[i + 1], right[i], right[i + 1]});
        } else {
          global_store(to, float2{left[i], left[i + 1]});
          global_store(to + 8, float2{right[i], right[i + 1]});
        }
      }
    }
  }
};

}  // namespace densenet_efficient::conv1x1_backward
