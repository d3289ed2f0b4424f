// The 3x3 convolution's weight gradient: dweight [K, C, 3, 3] = sum over pixels of dy^T times
// relu(a * x + s) at each of nine shifts.
//
// Tile: rows of pixels of the images (halo.cuh), 16, 32 or 48 outputs, 64 channels. It is dy that
// is shifted, so that x needs no halo and each element of it is normalised once, in place.
// Who owns what: three warps for each 32 channels, one for each row of taps: 3 taps x outputs x
// 32 channels of dweight in registers for the whole run. A block walks over a static range of
// tiles; cp.async loads the next tile of x while this one is multiplied.
// Bytes: x once, dy and y times the halo's share once for every 64 channels (from the L2 cache
// after the first: blocks of the same rows are neighbours), partial sums 4 * 9 K C for each row
// block, twice. Sums: fp32 in registers over the block's pixels in order; blocks in a second pass.
#pragma once

#include "conv3x3_gradients.cuh"

namespace densenet_efficient {

struct WeightGradient {
  OutputGradient gradient;  // [M, K]
  device::RowTensor x;      // [M, C]
  device::Table norm;       // [4, C]
  float* partial;           // [row blocks, 9 K, pitch]
  int64_t pitch;            // C, padded to panels
  int channels, outputs;    // C, K
  int panels;               // of 32 channels, of a block
  int channel_blocks;       // blocks that share a range of tiles, beside block_y() for outputs
};

struct WeightGradientLayout {
  static constexpr int kStages = 2;
  static constexpr int kGroup = workspace::cuda::Tile3x3::kGroup;
  int positions, groups, panels, output_panels;

  // A stage: x and the norm of each panel. Behind the stages: dy, its correction, the tile's
  // pixels.
  DE_HOST_DEVICE int x_bytes() const { return groups * kGroup * device::kPanelRowBytes; }
  DE_HOST_DEVICE int panel_bytes() const { return x_bytes() + device::kScaleShiftBytes; }
  DE_HOST_DEVICE int stage_bytes() const { return panels * panel_bytes(); }
  DE_HOST_DEVICE int dy_offset() const { return kStages * stage_bytes(); }
  DE_HOST_DEVICE int correction_offset() const {
    return dy_offset() + output_panels * (positions * device::kPanelRowBytes + device::kZeroBytes);
  }
  DE_HOST_DEVICE int pixels_offset() const {
    return correction_offset() + output_panels * device::kCorrectionBytes;
  }

  static workspace::cuda::Tile3x3::Shared shared(int panels, int output_panels) {
    return {kStages * panels * device::kScaleShiftBytes +
                output_panels * (device::kZeroBytes + device::kCorrectionBytes),
            output_panels * device::kPanelRowBytes,
            kStages * panels * kGroup * device::kPanelRowBytes + kGroup * device::kPixelBytes};
  }
};

namespace weight_gradient {

using namespace device;
using Layout = WeightGradientLayout;

// One row of taps over a tile: kDepths times 16 outputs, 32 channels.
template <typename T, int kDepths>
__device__ __forceinline__ void multiply_tile(float (&acc)[3][kDepths][4][4],
                                              const unsigned char* shared, int dy, int panel_bytes,
                                              const unsigned char* x, const unsigned char* pixels,
                                              int zeros, int dh, int pitch, int steps) {
  const int lane = lane_index();
  const int x_offset = panel_offset(a_row(lane), a_chunk(lane));
  for (int step = 0; step < steps; ++step) {
    uint32_t b[2][4];
#pragma unroll
    for (int j = 0; j < 2; ++j)
      ldmatrix_x4_trans(b[j], x + step * 16 * kPanelRowBytes + (x_offset ^ (32 * j)));
    const uint32_t row = operand_row(pixels, 16 * step + b_row(lane), b_chunk(lane));
#pragma unroll
    for (int dw = -1; dw <= 1; ++dw) {
      const int offset = tap_offset(row, 3 * dh + dw + 4, dh * pitch + dw, dy, zeros);
#pragma unroll
      for (int m = 0; m < kDepths; ++m) {
        uint32_t a[4];
        ldmatrix_x4_trans(a, shared + (m / 2 * panel_bytes + (offset ^ (32 * (m % 2)))));
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const uint32_t left[2] = {b[j][0], b[j][1]}, right[2] = {b[j][2], b[j][3]};
          mma_16x8x16<T>(acc[dw + 1][m][2 * j], a, left);
          mma_16x8x16<T>(acc[dw + 1][m][2 * j + 1], a, right);
        }
      }
    }
  }
}

template <typename T, int kDepths>
__global__ void __launch_bounds__(192, kDepths < 3 ? 2 : 1)
    kernel(WeightGradient args, Images images) {
  constexpr int kOutputs = 16 * kDepths, kOutputPanels = (kDepths + 1) / 2;
  const Layout layout{images.positions, images.groups, args.panels, kOutputPanels};
  const int threads = 96 * args.panels, warp = warp_index(), lane = lane_index();
  const int channel_block = block_x() % args.channel_blocks;
  const int row_block = block_x() / args.channel_blocks;
  const int row_blocks = grid_x() / args.channel_blocks;
  const int channel0 = channel_block * args.panels * kPanelChannels;
  const int output0 = block_y() * kOutputs;
  const int outputs = args.outputs - output0 < kOutputs ? args.outputs - output0 : kOutputs;
  const int64_t first_tile = images.tiles * row_block / row_blocks;
  const int64_t last_tile = images.tiles * (row_block + 1) / row_blocks;
  const OutputGradient gradient = args.gradient.from_channel(output0);
  unsigned char* shared = shared_memory();
  unsigned char* pixels = shared + layout.pixels_offset();

  clear_zero_rows(shared + layout.dy_offset(), images, kOutputPanels, threads);
  load_correction(shared + layout.correction_offset(), gradient, outputs, kOutputPanels, threads);

  const auto load = [&](int64_t tile, int stage_index) {
    if (tile < last_tile) {
      const TileOrigin origin(images, tile);
      for (int panel = 0; panel < args.panels; ++panel) {
        unsigned char* to =
            shared + stage_index * layout.stage_bytes() + panel * layout.panel_bytes();
        const int channel = channel0 + panel * kPanelChannels;
        copy_pixels<T>(to, images, origin, args.x, channel, args.channels, threads);
        copy_scale_shift(to + layout.x_bytes(), args.norm, channel, args.channels, threads);
      }
    }
    cp_async_commit();
  };
  load(first_tile, 0);

  const int dh = warp % 3 - 1, own_panel = warp / 3;
  float acc[3][kDepths][4][4] = {};
  int stage_index = 0;
  for (int64_t tile = first_tile; tile < last_tile; ++tile) {
    unsigned char* stage = shared + stage_index * layout.stage_bytes();
    const TileOrigin origin(images, tile);
    cp_async_wait<0>();
    sync_threads();
    load(tile + 1, 1 - stage_index);
    describe_tile(images, origin, pixels, threads);
    load_gradient<T, 2>(shared + layout.dy_offset(), shared + layout.correction_offset(), images,
                        origin, gradient, outputs, kOutputPanels, threads);
    for (int panel = 0; panel < args.panels; ++panel) {
      unsigned char* x = stage + panel * layout.panel_bytes();
      normalise_panel<T>(x, x + layout.x_bytes(), images.groups * Layout::kGroup, threads);
    }
    sync_threads();
    multiply_tile<T, kDepths>(acc, shared, layout.dy_offset(), gradient_panel_bytes(images),
                              stage + own_panel * layout.panel_bytes(), pixels,
                              layout.dy_offset() + images.positions * kPanelRowBytes, dh,
                              images.pitch, images.groups * (Layout::kGroup / 16));
    stage_index = 1 - stage_index;
  }

  const int g = lane >> 2, t = lane & 3;
  float* partial = args.partial + int64_t(row_block) * kTaps * args.outputs * args.pitch +
                   channel0 + own_panel * kPanelChannels;
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
