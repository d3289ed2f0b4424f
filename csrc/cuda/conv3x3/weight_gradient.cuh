// The 3x3 convolution's weight gradient: dweight [K, C, 3, 3] = sum over pixels of dy^T times
// relu(a * x + s) at each of nine shifts.
//
// Tile: rows of pixels of the images (conv3x3/halo.cuh), 16, 32 or 48 outputs, 64 channels. It is
// dy that is shifted, so that x needs no halo and each element of it is normalised once, in place.
// Who owns what: three warps for each 32 channels, one for each row of taps: 3 taps x outputs x
// 32 channels of dweight in registers for the whole run. A block walks over a static range of
// tiles; cp.async loads the next tile of x while this one is multiplied.
// Bytes: x once, dy and y times the halo's share once for every 64 channels (from the L2 cache
// after the first: blocks of the same rows are neighbours), partial sums 4 * 9 K C for each row
// block, twice. Sums: fp32 in registers over the block's pixels in order; blocks in a second pass.
#pragma once

#include "output_gradient.cuh"

namespace densenet_efficient {

struct WeightGradient {
  OutputGradient gradient;  // [M, K]
  device::RowTensor x;      // [M, C]
  device::Table norm;       // [5, C]
  float* partial;           // [row blocks, 9 K, pitch]
  int64_t pitch;            // C, padded to panels
  int channels, outputs;    // C, K
  int units;                // of 32 channels, of a block
  int channel_blocks;       // blocks that share a range of tiles, block_y() divides the outputs
};

namespace weight_gradient {

using namespace device;
using Layout = tiling::WeightGradientLayout3x3;
constexpr int kGroup = tiling::Tile3x3::kGroup;

// One row of taps over a tile: kDepths times 16 outputs, 32 channels.
template <typename T, int kDepths>
__device__ __forceinline__ void multiply_tile(float (&acc)[3][kDepths][4][4],
                                              const unsigned char* shared, int dy, int dy_pitch,
                                              const unsigned char* x, int x_pitch,
                                              const unsigned char* pixels, int zeros, int dh,
                                              int pitch, int steps) {
  const int lane = lane_index();
  int of_x[kPointers<T>];
#pragma unroll
  for (int i = 0; i < kPointers<T>; ++i)
    of_x[i] = byte_offset<T>(b_depth<T>(lane, i), 0, b_byte<T>(lane));
  for (int step = 0; step < steps; ++step) {
    uint32_t b[2][4], rows[kPointers<T>];
#pragma unroll
    for (int j = 0; j < 2; ++j)
      load_b_transposed<T>(b[j],
                           x + sixteen_offset<T>(j, x_pitch) + step * kDepth<T> * kPanelRowBytes,
                           of_x, sixteen_swizzle<T>(j));
#pragma unroll
    for (int i = 0; i < kPointers<T>; ++i)
      rows[i] = operand_row(pixels, kDepth<T> * step + a_depth<T>(lane, i), a_byte<T>(lane));
#pragma unroll
    for (int dw = -1; dw <= 1; ++dw) {
      int of_dy[kPointers<T>];
#pragma unroll
      for (int i = 0; i < kPointers<T>; ++i)
        of_dy[i] = tap_offset<T>(rows[i], 3 * dh + dw + 4, dh * pitch + dw, dy, zeros);
#pragma unroll
      for (int m = 0; m < kDepths; ++m) {
        uint32_t a[4];
        load_a_transposed<T>(a, shared + sixteen_offset<T>(m, dy_pitch), of_dy,
                             sixteen_swizzle<T>(m));
#pragma unroll
        for (int j = 0; j < 2; ++j)
          multiply_add_pair<T>(acc[dw + 1][m][2 * j], acc[dw + 1][m][2 * j + 1], a, b[j]);
      }
    }
  }
}

template <typename T, int kDepths>
__global__ void __launch_bounds__(192, kDepths < 3 ? 2 : 1)
    norm_relu_conv3x3_backward_weight_kernel(WeightGradient args, Images images) {
  constexpr int kOutputs = 16 * kDepths, kOutputPanels = tiling::panels(kOutputs, sizeof(T));
  constexpr int kUnitPanels = 32 / kPanelChannels<T>;
  const Layout layout{sizeof(T), images.positions, images.groups, args.units, kOutputs};
  const int threads = 96 * args.units, warp = warp_index(), lane = lane_index();
  const int channel_block = block_x() % args.channel_blocks;
  const int row_block = block_x() / args.channel_blocks;
  const int row_blocks = grid_x() / args.channel_blocks;
  const int channel0 = channel_block * args.units * 32;
  const int output0 = block_y() * kOutputs;
  const int outputs = args.outputs - output0 < kOutputs ? args.outputs - output0 : kOutputs;
  const int first_tile = images.first_tile(row_block, row_blocks);
  const int last_tile = images.first_tile(row_block + 1, row_blocks);
  const OutputGradient gradient = args.gradient.from_channel<T>(output0);
  unsigned char* shared = shared_memory();
  unsigned char* pixels = shared + layout.pixels_offset();

  clear_zero_rows(shared + layout.dy_offset(), images, kOutputPanels, threads);
  load_correction<T>(shared + layout.correction_offset(), gradient, outputs, kOutputPanels,
                     threads);

  const auto load = [&](int tile, int stage_index) {
    if (tile < last_tile) {
      const TileOrigin origin(images, tile);
      for (int panel = 0; panel < layout.panels(); ++panel) {
        unsigned char* to =
            shared + stage_index * layout.stage_bytes() + panel * layout.panel_bytes();
        const int channel = channel0 + panel * kPanelChannels<T>;
        copy_pixels<T>(to, images, origin, args.x, channel, args.channels, threads);
        copy_scale_shift<T>(to + layout.x_bytes(), args.norm, channel, args.channels,
                            thread_index(), threads);
      }
    }
    cp_async_commit();
  };
  load(first_tile, 0);

  const int dh = warp % 3 - 1, own_unit = warp / 3;
  float acc[3][kDepths][4][4] = {};
  int stage_index = 0;
  for (int tile = first_tile; tile < last_tile; ++tile) {
    unsigned char* stage = shared + stage_index * layout.stage_bytes();
    const TileOrigin origin(images, tile);
    cp_async_wait<0>();
    sync_threads();
    load(tile + 1, 1 - stage_index);
    describe_tile(images, origin, pixels, threads);
    load_gradient<T, 2>(shared + layout.dy_offset(), shared + layout.correction_offset(), images,
                        origin, gradient, outputs, kOutputPanels, threads);
    for (int panel = 0; panel < layout.panels(); ++panel) {
      unsigned char* x = stage + panel * layout.panel_bytes();
      normalise_panel<T>(x, x + layout.x_bytes(), images.groups * kGroup, threads);
    }
    sync_threads();
    multiply_tile<T, kDepths>(acc, shared, layout.dy_offset(), gradient_panel_bytes(images),
                              stage + own_unit * kUnitPanels * layout.panel_bytes(),
                              layout.panel_bytes(), pixels,
                              layout.dy_offset() + images.positions * kPanelRowBytes, dh,
                              images.pitch, images.groups * (kGroup / kDepth<T>));
    stage_index = 1 - stage_index;
  }

  const int g = lane >> 2, t = lane & 3;
  float* partial = args.partial + int64_t(row_block) * kTaps * args.outputs * args.pitch +
                   channel0 + 32 * own_unit;
#pragma unroll
  for (int dw = 0; dw < 3; ++dw) {
#pragma unroll
    for (int m = 0; m < kDepths; ++m) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int output = 16 * m + 8 * half + g;
          const int tap = 8 - (3 * (dh + 1) + dw);
          if (output < outputs)
            global_store(partial + ((output0 + output) * kTaps + tap) * args.pitch + 8 * j + 2 * t,
                         float2{acc[dw][m][j][2 * half], acc[dw][m][j][2 * half + 1]});
        }
      }
    }
  }
}

}  // namespace weight_gradient
}  // namespace densenet_efficient
