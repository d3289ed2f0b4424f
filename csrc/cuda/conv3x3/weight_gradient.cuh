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

#include "copies.cuh"
#include "output_gradient.cuh"

namespace densenet_efficient {

struct WeightGradient {
  OutputGradient gradient;  // [M, K]
  device::RowTensor x;      // [M, C]
  device::Table norm;       // [5, C]
  float* partial;           // [row blocks, 9 K, pitch]
  int64_t pitch;            // C, padded to panels
  int channels, outputs;    // C, K
  bool usual;               // x has usual rows, and all its panels are whole
  int units;                // of 32 channels, of a block
  int channel_blocks;       // blocks that share a range of tiles, block_y() divides the outputs
  tiling::WeightGradientLayout3x3::Offsets shared;
};

namespace weight_gradient {

using namespace device;
constexpr int kGroup = tiling::Tile3x3::kGroup;

// Anew at every use: kept over tiles, where it would spill, it is the thread alone.
__device__ __forceinline__ int own_warp() { return kept(thread_index()) >> 5; }

// One row of taps over a tile: kDepths times 16 outputs, 32 channels.
template <typename T, int kDepths>
__device__ __forceinline__ void multiply_tile(float (&acc)[3][kDepths][4][4],
                                              const unsigned char* shared, int dy, int dy_pitch,
                                              const unsigned char* x, int x_pitch,
                                              const unsigned char* pixels, int zeros, int dh,
                                              int pitch, int steps) {
  // Through a shuffle, so that what follows from the lane is not kept over tiles, where it spills.
  const int lane = kept(lane_index());
  // A step is a multiple of eight rows: chunks keep their order.
  int of_x[kPointers<T>], of_dy[3][kPointers<T>];
#pragma unroll
  for (int i = 0; i < kPointers<T>; ++i) {
    of_x[i] = byte_offset<T>(b_depth<T>(lane, i), 0, b_byte<T>(lane));
#pragma unroll
    for (int dw = 0; dw < 3; ++dw) {
      const int position = a_depth<T>(lane, i) + (1 + dh) * pitch + dw - 1;
      of_dy[dw][i] = swizzle_chunks<T>(dy + position * kPanelRowBytes + a_byte<T>(lane));
    }
  }
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    uint32_t b[2][4], neighbours[kPointers<T>];
#pragma unroll
    for (int j = 0; j < 2; ++j)
      load_b_transposed<T>(b[j],
                           x + sixteen_offset<T>(j, x_pitch) + step * kDepth<T> * kPanelRowBytes,
                           of_x, sixteen_swizzle<T>(j));
#pragma unroll
    for (int i = 0; i < kPointers<T>; ++i)
      neighbours[i] =
          neighbours_of(pixels, a_depth<T>(lane, i) + kDepth<T> * step) >> (3 * (1 + dh));
#pragma unroll
    for (int dw = 0; dw < 3; ++dw) {
      int from[kPointers<T>];
#pragma unroll
      for (int i = 0; i < kPointers<T>; ++i) {
        const int zero = zeros | (of_dy[dw][i] & (kZeroBytes - 1));
        from[i] = neighbours[i] >> dw & 1 ? of_dy[dw][i] : zero;
        of_dy[dw][i] += kDepth<T> * kPanelRowBytes;
      }
#pragma unroll
      for (int m = 0; m < kDepths; ++m) {
        uint32_t a[4];
        load_a_transposed<T>(a, shared + sixteen_offset<T>(m, dy_pitch), from,
                             sixteen_swizzle<T>(m));
#pragma unroll
        for (int j = 0; j < 2; ++j)
          multiply_add_pair<T>(acc[dw][m][2 * j], acc[dw][m][2 * j + 1], a, b[j]);
      }
    }
  }
}

template <typename T, int kDepths>
__global__ void __launch_bounds__(192, kDepths < 3 ? 2 : 1)
    norm_relu_conv3x3_backward_weight_kernel(WeightGradient args, Images images) {
  constexpr int kOutputs = 16 * kDepths, kOutputPanels = tiling::panels(kOutputs, sizeof(T));
  constexpr int kUnitPanels = 32 / kPanelChannels<T>;
  const int panels = args.units * kUnitPanels;
  const int threads = 96 * args.units;
  const int channel_block = block_x() % args.channel_blocks;
  const int row_block = block_x() / args.channel_blocks;
  const int row_blocks = grid_x() / args.channel_blocks;
  const int channel0 = channel_block * args.units * 32;
  const int output0 = block_y() * kOutputs;
  const int end = min(args.outputs, output0 + kOutputs);
  const int first_tile = images.first_tile(row_block, row_blocks);
  const int last_tile = images.first_tile(row_block + 1, row_blocks);
  unsigned char* shared = shared_memory();
  unsigned char* pixels = shared + args.shared.pixels;

  for (int panel = 0; panel < kOutputPanels; ++panel)
    clear_zeros(shared + args.shared.zeros + panel * args.shared.dy_pitch, kZeroBytes, threads);
  load_correction<T>(shared + args.shared.correction, args.gradient, output0, end, kOutputPanels,
                     threads);

  const auto load = [&](int tile, int stage_index) {
    if (tile < last_tile) {
      unsigned char* const stage = shared + stage_index * args.shared.stage_bytes;
      const int thread = kept(thread_index()), pitch = args.shared.panel_bytes;
      for (int group = thread >> 5; group < images.groups; group += threads / 32) {
        const auto copy = [&](auto count, int panel) {
          unsigned char* const to = stage + panel * pitch;
          if (count > 1 && args.usual)
            copy_usual_group<T, kGroup, count>(to, pitch, images, tile, args.x, group * kGroup,
                                               channel0 / kPanelChannels<T> + panel, thread);
          else
            copy_group<T, kGroup, count>(to, pitch, images, tile, args.x, group * kGroup,
                                         channel0 + panel * kPanelChannels<T>, args.channels,
                                         thread);
        };
        for (int panel = 0; panel + 1 < panels; panel += 2)
          copy(std::integral_constant<int, 2>{}, panel);
        if (panels % 2) copy(std::integral_constant<int, 1>{}, panels - 1);
      }
      const int of_panel = thread / kPanelChannels<T>;
      if (of_panel < panels)
        copy_scale_shift<T>(stage + of_panel * pitch + args.shared.norm, args.norm,
                            channel0 + of_panel * kPanelChannels<T>, args.channels,
                            thread % kPanelChannels<T>);
    }
    cp_async_commit();
  };
  load(first_tile, 0);

  float acc[3][kDepths][4][4] = {};
  int stage_index = 0;
  for (int tile = first_tile; tile < last_tile; ++tile) {
    unsigned char* stage = shared + stage_index * args.shared.stage_bytes;
    const TileOrigin origin(images, tile);
    cp_async_wait<0>();
    sync_threads();
    load(tile + 1, 1 - stage_index);
    for (int panel = 0; panel < panels; ++panel) {
      unsigned char* x = stage + panel * args.shared.panel_bytes;
      normalise_panel<T>(x, x + args.shared.norm, images.groups * kGroup, threads);
    }
    describe_tile(images, origin, pixels, images.groups * kGroup, threads);
    // Anew in every tile: kept over tiles, output0 and end would spill on sm_120.
    const int first = kept(block_y()) * kOutputs, last = min(args.outputs, first + kOutputs);
    load_gradient<T, 2>(shared + args.shared.dy, args.shared.dy_pitch,
                        shared + args.shared.correction, images, origin, args.gradient, first, last,
                        kOutputPanels, threads);
    sync_threads();
    const int own = own_warp(), own_unit = own / 3, dh = own % 3 - 1;
    multiply_tile<T, kDepths>(acc, shared, args.shared.dy, args.shared.dy_pitch,
                              stage + own_unit * kUnitPanels * args.shared.panel_bytes,
                              args.shared.panel_bytes, pixels, args.shared.zeros, dh, images.pitch,
                              images.groups * (kGroup / kDepth<T>));
    stage_index = 1 - stage_index;
  }

  const int g = lane_index() >> 2, t = lane_index() & 3;
  // Divided anew, so that nothing of it is kept over tiles, where it spills.
  const int block = kept(block_x()), own = own_warp();
  float* partial = args.partial +
                   int64_t(block / args.channel_blocks) * kTaps * args.outputs * args.pitch +
                   (block % args.channel_blocks * args.units + own / 3) * 32;
#pragma unroll
  for (int dw = 0; dw < 3; ++dw) {
#pragma unroll
    for (int m = 0; m < kDepths; ++m) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int output = output0 + 16 * m + 8 * half + g;
          const int tap = 8 - (3 * (own % 3) + dw);
          if (output < end)
            global_store(partial + (output * kTaps + tap) * args.pitch + 8 * j + 2 * t,
                         float2{acc[dw][m][j][2 * half], acc[dw][m][j][2 * half + 1]});
        }
      }
    }
  }
}

}  // namespace weight_gradient
}  // namespace densenet_efficient
