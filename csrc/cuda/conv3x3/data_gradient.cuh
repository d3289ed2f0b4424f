// The 3x3 convolution's data gradient: dz [M, C] = conv3x3^T(dy, weight) * [a * x + s > 0], written
// to dx, or added to it times a; and the sums of dz and dz * x_hat.
//
// Tile: as in the forward pass, 64 pixels a warp, or 32 pixels and 16 channels. dy and its halo
// stay in shared memory for the whole tile; for a panel of x at a time (32 channels of 16 bits, 16
// of 32), their weight passes by and nine shifted products add up in registers. The result goes
// through the place where x lay, and leaves from there in rows.
// Who owns what: a block walks over a static range of tiles; (tile, panel of channels, panel of
// outputs) triples form one sequence, of which cp.async loads the next while this one is
// multiplied.
// Bytes: x once, dx once (accumulating: twice), dy and y times the halo's share, the weight once
// per tile (2 * 9 K C, from the L2 cache).
// Sums: fp32, a tile's in registers and over its warps in order, a block's tiles in order in its
// own partial, blocks in a second pass.
#pragma once

#include "../gemm/epilogue.cuh"
#include "copies.cuh"
#include "output_gradient.cuh"

namespace densenet_efficient {

struct DataGradient {
  OutputGradient gradient;   // [M, K]
  device::RowTensor x;       // [M, C]
  device::Table norm;        // [5, C]
  device::RowTensor weight;  // [9 K, C]
  device::RowTensor dx;      // [M, C]
  float* partial;            // [blocks, 2, pitch]: dgamma, dbeta
  int64_t pitch;             // C, padded to panels
  int channels, outputs;     // C, K
  int copied_outputs;        // of a panel of the weight, but those that hold fewer
  Eights copied_rows;        // their rows
  bool usual;                // x and weight have usual rows, and all their panels are whole
};

namespace data_gradient {

using namespace device;
using Layout = tiling::DataGradientLayout3x3;

// How the warps of a block divide pixels and the channels of a panel.
template <typename T, bool kShared>
constexpr tiling::Groups3x3 kDivision =
    kShared ? tiling::data_gradient_shared(sizeof(T)) : tiling::kAlone;

// The nine shifted products of 16 kRows pixels of dy, up to a panel of outputs, with their weight
// of the channels that the warp owns of a panel, which lies at a multiple of kZeroBytes; the first
// of them is at `byte` of its rows.
template <typename T, int kRows, int kTiles>
__device__ __forceinline__ void multiply_panel(float (&acc)[kRows][kTiles][4],
                                               const unsigned char* shared, int weight, int zeros,
                                               OperandRows<kRows> rows, int pitch, int outputs,
                                               int byte) {
  const int lane = lane_index();
  const bool second = outputs > kDepth<T>;
  // The neighbour at (dh, dw) took this pixel through the opposite tap.
  int of_row[kPointers<T>];
#pragma unroll
  for (int i = 0; i < kPointers<T>; ++i)
    of_row[i] = weight + (b_depth<T>(lane, i) * kTaps + kTaps - 1) * kPanelRowBytes +
                (byte | (b_byte<T>(lane) & ~15));
  rows.offset -= (pitch + 1) * kPanelRowBytes;
#pragma unroll 1
  for (int dh = 0; dh < 3; ++dh) {
#pragma unroll
    for (int dw = 0; dw < 3; ++dw) {
      int of_weight[kPointers<T>], offsets[kRows];
#pragma unroll
      for (int i = 0; i < kPointers<T>; ++i)
        of_weight[i] = swizzle_chunks<T>(of_row[i] - dw * kPanelRowBytes) + (b_byte<T>(lane) & 15);
      tap_offsets<T>(offsets, rows, 1u << dw, dw, zeros);
      const auto multiply = [&](int step) {
        uint32_t a[kRows][4];
#pragma unroll
        for (int m = 0; m < kRows; ++m)
          ldmatrix_x4(a[m], shared + (offsets[m] ^ (32 * step)) + 16 * m * kPanelRowBytes);
#pragma unroll
        for (int j = 0; j < kTiles; j += 2) {
          uint32_t b[4];
          load_b_transposed<T>(b, shared + kDepth<T> * step * kTaps * kPanelRowBytes, of_weight,
                               16 * j);
          round_operands<T>(b);
#pragma unroll
          for (int m = 0; m < kRows; ++m) multiply_add_pair<T>(acc[m][j], acc[m][j + 1], a[m], b);
        }
      };
      multiply(0);
      if (second) multiply(1);
    }
#pragma unroll
    for (int i = 0; i < kPointers<T>; ++i) of_row[i] -= 3 * kPanelRowBytes;
    rows.skip_taps(1, pitch);
  }
}

// Mask, sums and result of a warp's pixels, the result in place of x; `sums` [channels, 2]. Of the
// panel's channels there are `channels`, in steps of 16; `first`: eights of them before the warp's.
template <typename T, bool kAccumulate, int kRows, int kTiles>
__device__ __forceinline__ void finish_panel(const float (&acc)[kRows][kTiles][4], unsigned char* x,
                                             const unsigned char* dx, const unsigned char* norm,
                                             float* sums, int channels, int first) {
  const int lane = lane_index(), g = lane >> 2, t = lane & 3;
  constexpr int kTileBytes = 8 * sizeof(T);
  const int accumulator = accumulator_offset<T>(lane);
#pragma unroll
  for (int pair = 0; pair < kTiles; pair += 2) {
    if (8 * (first + pair) >= channels) break;
    float own[8];  // of two tiles: two channels' dgamma and dbeta
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      const int j = first + pair + tile, channel = 8 * j + 2 * t;
      const float4 low = shared_load<float4>(norm + channel * 16);
      const float4 high = shared_load<float4>(norm + (channel + 1) * 16);
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int offset =
              (16 * m + 8 * half) * kPanelRowBytes + (accumulator ^ (kTileBytes * j));
          const float2 v = unpack_two<T>(shared_load<Two<T>>(x + offset));
          const float dz_low =
              relu_mask(acc[m][pair + tile][2 * half], normalise(v.x, low.x, low.y));
          const float dz_high =
              relu_mask(acc[m][pair + tile][2 * half + 1], normalise(v.y, high.x, high.y));
          const float terms[4] = {dz_low * (v.x - low.z), dz_low, dz_high * (v.y - high.z),
                                  dz_high};
#pragma unroll
          for (int i = 0; i < 4; ++i)
            own[4 * tile + i] = m + half > 0 ? own[4 * tile + i] + terms[i] : terms[i];
          float2 out{dz_low, dz_high};
          if constexpr (kAccumulate) {
            const float2 before = unpack_two<T>(shared_load<Two<T>>(dx + offset));
            out = float2{before.x + low.x * dz_low, before.y + high.x * dz_high};
          }
          shared_store(x + offset, pack_two<T>(out.x, out.y));
        }
      }
      own[4 * tile] *= low.w;
      own[4 * tile + 2] *= high.w;
    }
    // Eight lanes have these sums of the same channels: each adds up one of the eight.
    const float sum = share_of_sums(own, lane);
    shared_store(sums + 2 * (8 * (first + pair + (g >> 2)) + 2 * t) + (g & 3), sum);
  }
}

// The groups' sums of one panel from `channel` on, in order, to the block's partial; zeros past the
// channels' end.
template <typename T>
__device__ __forceinline__ void add_sums(const float* sums, float* partial, int64_t pitch,
                                         int channel, int channels, int groups, int threads,
                                         bool first) {
  constexpr int kSums = kDnormRows * kPanelChannels<T>;
  for (int i = thread_index(); i < kSums; i += threads) {
    const int taken = channel + i / kDnormRows < channels ? groups : 0;
    float sum = 0.0f;
    for (int group = 0; group < taken; ++group) sum += shared_load<float>(sums + group * kSums + i);
    float* out = partial + i % kDnormRows * pitch + channel + i / kDnormRows;
    global_store(out, first ? sum : global_load<float>(out) + sum);
  }
}

// kShared: warps share groups of 32 pixels, 16 channels of a panel each, and block_y() divides the
// panels among blocks; otherwise a warp has a group of 64 pixels.
template <typename T, bool kAccumulate, bool kShared>
__global__ void __launch_bounds__(32 * kDivision<T, kShared>.share * kDivision<T, kShared>.most,
                                  kShared ? 1 : 2)
    norm_relu_conv3x3_backward_data_kernel(DataGradient args, Images images) {
  constexpr int kChannels = kPanelChannels<T>, kSums = kDnormRows * kChannels;
  constexpr int kGroup = kDivision<T, kShared>.pixels, kShare = kDivision<T, kShared>.share;
  constexpr int kRows = kGroup / 16, kTiles = kChannels / 8 / kShare;
  const int output_panels = max(1, panels_of<T>(args.outputs));
  const Layout layout{sizeof(T),     images.positions, images.groups,
                      output_panels, kAccumulate,      kGroup};
  const int threads = 32 * kShare * images.groups, warp = warp_index();
  const int lane = lane_index();
  const int all_panels = panels_of<T>(args.channels);
  const int first_panel = all_panels * block_y() / grid_y();
  const int last_panel = all_panels * (block_y() + 1) / grid_y();
  const int first_tile = images.first_tile(block_x(), grid_x());
  const int last_tile = images.first_tile(block_x() + 1, grid_x());
  unsigned char* shared = shared_memory();
  unsigned char* pixels = shared + layout.pixels_offset();
  float* sums = reinterpret_cast<float*>(shared + layout.sums_offset());
  float* partial = args.partial + int64_t(block_x()) * kDnormRows * args.pitch;
  const int warp_pixel = warp / kShare * kGroup, dy_pitch = images.positions * kPanelRowBytes;
  const int own_tile = warp % kShare * kTiles;  // the first of the warp's channels, in eights

  clear_zeros(shared + layout.zero_offset(), kGroupZeroBytes, threads);
  load_correction<T>(shared + layout.correction_offset(), args.gradient, 0, args.outputs,
                     output_panels, threads);

  int load_tile = first_tile;
  int load_panel = first_panel, load_output = 0;
  constexpr int kPixels = kGroup / kShare;  // of x, that a warp copies
  const auto load = [&](int stage_index) {
    if (load_tile < last_tile) {
      const int thread = kept(thread_index());
      unsigned char* stage = shared + stage_index * layout.stage_bytes();
      const int channel = load_panel * kChannels, output = load_output * kChannels;
      // No further than the products go: half of the panel where it holds no more outputs.
      const int outputs = args.outputs - output;
      const bool last_output = load_output + 1 == output_panels;
      if (!kShared && !kAccumulate && args.usual) {
        const RowPart part = RowPart::of<T>(args.copied_rows, thread);
        copy_whole_rows<kUsualPitch<T>>(stage,
                                        static_cast<const unsigned char*>(args.weight.data) +
                                            ((kTaps * output + part.first) * kUsualPitch<T> +
                                             load_panel * kPanelRowBytes + 16 * part.chunk),
                                        part, 0);
        if (last_output)
          copy_usual_group<T, kPixels, 1>(stage + layout.x_offset(), 0, images, load_tile, args.x,
                                          (thread >> 5) * kPixels, load_panel, thread);
      } else {
        if (args.weight.vector == kChunk<T> && outputs >= args.copied_outputs &&
            channel + kChannels <= args.channels) {
          const RowPart part = RowPart::of<T>(args.copied_rows, thread);
          copy_whole_rows<0>(
              stage, chunk_at<T>(args.weight, kTaps * output + part.first, load_panel, part.chunk),
              part, row_pitch<T>(args.weight));
        } else {
          const int rows = outputs > kDepth<T> ? kChannels : kDepth<T>;
          copy_tile_rows<T>(
              stage, args.weight,
              {0, kTaps * output, 0, kTaps * outputs, kTaps * rows, channel, args.channels},
              threads);
        }
        if (last_output) {
          const auto copy_pixels = [&](unsigned char* to, const RowTensor& from) {
            copy_group<T, kPixels, 1>(to, 0, images, load_tile, from, (thread >> 5) * kPixels,
                                      channel, args.channels, thread);
          };
          copy_pixels(stage + layout.x_offset(), args.x);
          if constexpr (kAccumulate) copy_pixels(stage + layout.dx_offset(), args.dx);
        }
      }
      if (last_output)
        copy_norm<T>(stage + layout.norm_offset(), args.norm, channel, args.channels, thread);
      if (++load_output == output_panels) {
        load_output = 0;
        if (++load_panel == last_panel) {
          load_panel = first_panel;
          ++load_tile;
        }
      }
    }
    cp_async_commit();
  };
  load(0);

  int stage_index = 0, sums_index = 0;
  int open_panel = -1;  // whose sums the warps have written, but that are not added up yet
  const auto close_panel = [&](bool first) {
    if (open_panel >= 0)
      add_sums<T>(sums + (1 - sums_index) * images.groups * kSums, partial, args.pitch,
                  open_panel * kChannels, args.channels, images.groups, threads, first);
    open_panel = -1;
  };
  for (int tile = first_tile; tile < last_tile; ++tile) {
    const TileOrigin origin(images, tile);
    sync_threads();  // every warp is done with the tile before
    describe_tile(images, origin, pixels, images.groups * kGroup, threads);
    load_gradient<T, 4>(shared + layout.dy_offset(), dy_pitch, shared + layout.correction_offset(),
                        images, origin, args.gradient, 0, args.outputs, output_panels, threads);
    for (int panel = first_panel; panel < last_panel; ++panel) {
      float acc[kRows][kTiles][4] = {};
      for (int output = 0; output < output_panels; ++output) {
        unsigned char* stage = shared + stage_index * layout.stage_bytes();
        cp_async_wait<0>();
        sync_threads();
        load(1 - stage_index);
        close_panel(panel > first_panel ? tile == first_tile : tile == first_tile + 1);
        multiply_panel<T>(acc, shared, stage_index * layout.stage_bytes(), layout.zero_offset(),
                          operand_rows<kRows>(pixels, warp_pixel + a_row(lane), 16 * a_chunk(lane),
                                              layout.dy_offset() + output * dy_pitch, images.pitch),
                          images.pitch, args.outputs - output * kChannels,
                          own_tile * 8 * static_cast<int>(sizeof(T)));
        if (output + 1 == output_panels) {
          unsigned char* x = stage + layout.x_offset() + warp_pixel * kPanelRowBytes;
          finish_panel<T, kAccumulate>(acc, x,
                                       stage + layout.dx_offset() + warp_pixel * kPanelRowBytes,
                                       stage + layout.norm_offset(),
                                       sums + (sums_index * images.groups + warp / kShare) * kSums,
                                       args.channels - panel * kChannels, own_tile);
          sync_warp();
          // A lane's rows and chunk of those that the warp owns: rows 0, 1, 4, 5 where they are
          // half as long, so that eight lanes meet each bank once.
          constexpr int kLanes = 4 / kShare, kStep = 32 / kLanes;  // of a row; rows at a time
          const int chunk = warp % kShare * kLanes + lane % kLanes;
          const int number = lane / kLanes;
          const int row =
              kShare == 1 ? number : (number & ~6) | (number & 2) << 1 | (number & 4) >> 1;
          const int channel = panel * kChannels + chunk * kChunk<T>;
          const int left = args.channels - channel;
          const int pitch = static_cast<int>(args.dx.stride) * static_cast<int>(sizeof(T));
          T* const to = args.dx.at<T>(origin.pixel(images), channel);
          store_rows<T, kGroup / kStep>(
              to, pitch, left, args.dx.vector,
              [&](int i) {
                return shared_load<int>(pixels + (warp_pixel + row + kStep * i) * kPixelBytes);
              },
              [&](int i) {
                return shared_load<uint4>(x + panel_offset<T>(row, chunk) +
                                          kStep * i * kPanelRowBytes);
              });
          open_panel = panel;
          sums_index = 1 - sums_index;
        }
        stage_index = 1 - stage_index;
      }
    }
  }
  sync_threads();
  close_panel(last_tile == first_tile + 1);
}

}  // namespace data_gradient
}  // namespace densenet_efficient
