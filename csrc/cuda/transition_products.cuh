// The two products of the transition's backward on tensor cores: dpooled = dy @ weight and
// dweight = dy^T @ pooled. Both keep a block tile of 128 x 128, a warp 32 x 128, their operands in
// panels of 32 channels (tile.cuh), kStages deep. dpooled and pooled lie in dx, in the first and
// the second pixel of each window.
#pragma once

#include "operands.h"
#include "quads.h"

namespace densenet_efficient {

constexpr int kWarps = 4, kThreads = 32 * kWarps, kStages = 3;
constexpr int kTile = 128;  // windows or outputs, and channels, of a product's tile
constexpr int kTiles = kTile / 8;
constexpr int kPanels = kTile / device::kPanelChannels;
constexpr int kPanelBytes = 32 * device::kPanelRowBytes;  // 32 rows of 32 channels
constexpr int kStageBytes = 2 * kPanels * kPanelBytes;    // both operands: 128 x 32 and 32 x 128

// acc += a @ b for one k16 step: b [16, 128] lies in kPanels panels with the depth along their
// rows.
template <typename T>
__device__ __forceinline__ void multiply(float (&acc)[2][kTiles][4], const uint32_t (&a)[2][4],
                                         const unsigned char* b_panels, int step) {
  using namespace device;
  const int lane = lane_index();
#pragma unroll
  for (int j = 0; j < kTiles; j += 2) {
    uint32_t b[4];
    ldmatrix_x4_trans(b, b_panels + j / 4 * kPanelBytes +
                             panel_offset(16 * step + a_row(lane), j % 4 + a_chunk(lane)));
    const uint32_t left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      mma_16x8x16<T>(acc[m][j], a[m], left);
      mma_16x8x16<T>(acc[m][j + 1], a[m], right);
    }
  }
}

// ---- 1. dpooled = dy @ weight -------------------------------------------------------------------

struct Product {
  device::RowTensor dy;      // [M, K]
  device::RowTensor weight;  // [K, C]
  device::RowTensor dx;      // [N * H * W, C]
  Quads quads;               // M windows
  int channels;              // C
  int outputs;               // K
};

constexpr int kProductStaging = kStages * kStageBytes;
constexpr int kProductCorners = kProductStaging + kWarps * kPanelBytes;
constexpr int kProductBytes = kProductCorners + kTile * 4;

template <typename T>
__global__ void __launch_bounds__(kThreads, 2) transition_product_kernel(Product args) {
  using namespace device;
  const int warp = warp_index(), lane = lane_index();
  const int load_row = thread_index() >> 2, load_chunk = thread_index() & 3;
  const int row0 = block_x() * kTile, column0 = block_y() * kTile;
  const int depths = max(1, (args.outputs + kPanelChannels - 1) / kPanelChannels);
  unsigned char* const shared = shared_memory();

  const auto load = [&](int depth) {
    if (depth < depths) {
      unsigned char* const to = shared + depth % kStages * kStageBytes;
      const int output = depth * kPanelChannels;
      const int dy_output = output + load_chunk * kChunk, weight_output = output + load_row;
#pragma unroll
      for (int panel = 0; panel < kPanels; ++panel) {
        const int offset = panel * kPanelBytes + panel_offset(load_row, load_chunk);
        const int row = row0 + 32 * panel + load_row;
        const bool row_exists = row < args.quads.windows;
        copy_chunk(to + offset, args.dy.at<T>(row_exists ? row : 0, dy_output),
                   row_exists ? channels_left(dy_output, args.outputs) : 0, args.dy.vector);
        const int channel = column0 + kPanelChannels * panel + load_chunk * kChunk;
        const bool output_exists = weight_output < args.outputs;
        copy_chunk(to + kPanels * kPanelBytes + offset,
                   args.weight.at<T>(output_exists ? weight_output : 0, channel),
                   output_exists ? channels_left(channel, args.channels) : 0, args.weight.vector);
      }
    }
    cp_async_commit();
  };
  for (int depth = 0; depth < kStages - 1; ++depth) load(depth);

  // Where the warp's rows go.
  int* const corners = reinterpret_cast<int*>(shared + kProductCorners) + 32 * warp;
  const int own_row = row0 + 32 * warp + lane;
  shared_store(corners + lane, own_row < args.quads.windows ? args.quads.corner(own_row) : -1);
  sync_warp();

  float acc[2][kTiles][4] = {};
  for (int depth = 0; depth < depths; ++depth) {
    cp_async_wait<kStages - 2>();
    sync_threads();
    load(depth + kStages - 1);
    const unsigned char* const from = shared + depth % kStages * kStageBytes;
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      uint32_t a[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m)
        ldmatrix_x4(a[m], from + warp * kPanelBytes +
                              panel_offset(16 * m + a_row(lane), 2 * step + a_chunk(lane)));
      multiply<T>(acc, a, from + kPanels * kPanelBytes, step);
    }
  }
  WarpMoments none{nullptr, nullptr, 0.0f};
  write_rows<T, kTiles>(acc, shared + kProductStaging + warp * kPanelBytes, args.dx, column0,
                        min(column0 + kTile, args.channels), false, none,
                        [&](int r) { return int64_t(shared_load<int>(corners + r)); });
}

// ---- 3. dweight = dy^T @ pooled -----------------------------------------------------------------

struct Weight {
  device::RowTensor dy;  // [M, K]
  device::RowTensor dx;  // [N * H * W, C], pooled in each window's second pixel
  Quads quads;           // M windows
  float* partial;        // [blocks, K, pitch]
  int64_t pitch;         // C, made even
  int channels;          // C
  int outputs;           // K
  int channel_tiles;
};

template <typename T>
__global__ void __launch_bounds__(kThreads, 2) transition_weight_kernel(Weight args) {
  using namespace device;
  const int warp = warp_index(), lane = lane_index();
  const int load_row = thread_index() >> 2, load_chunk = thread_index() & 3;
  const int output0 = block_y() / args.channel_tiles * kTile;
  const int column0 = block_y() % args.channel_tiles * kTile;
  const int64_t depths = (args.quads.windows + 31) / 32;
  const int first = static_cast<int>(depths * block_x() / grid_x());
  const int last = static_cast<int>(depths * (block_x() + 1) / grid_x());
  unsigned char* const shared = shared_memory();

  const auto load = [&](int depth) {
    if (depth < last) {
      unsigned char* const to = shared + depth % kStages * kStageBytes;
      const int window = 32 * depth + load_row;
      const bool exists = window < args.quads.windows;
      const int pixel = exists ? args.quads.corner(window) + args.quads.offset(1) : 0;
#pragma unroll
      for (int panel = 0; panel < kPanels; ++panel) {
        const int offset = panel * kPanelBytes + panel_offset(load_row, load_chunk);
        const int within = kPanelChannels * panel + load_chunk * kChunk;
        copy_chunk(to + offset, args.dy.at<T>(exists ? window : 0, output0 + within),
                   exists ? channels_left(output0 + within, args.outputs) : 0, args.dy.vector);
        copy_chunk(to + kPanels * kPanelBytes + offset, args.dx.at<T>(pixel, column0 + within),
                   exists ? channels_left(column0 + within, args.channels) : 0, args.dx.vector);
      }
    }
    cp_async_commit();
  };
  for (int ahead = 0; ahead < kStages - 1; ++ahead) load(first + ahead);

  float acc[2][kTiles][4] = {};
  for (int depth = first; depth < last; ++depth) {
    cp_async_wait<kStages - 2>();
    sync_threads();
    load(depth + kStages - 1);
    const unsigned char* const from = shared + depth % kStages * kStageBytes;
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      uint32_t a[2][4];  // the panel's channels are a's rows
#pragma unroll
      for (int m = 0; m < 2; ++m)
        ldmatrix_x4_trans(a[m], from + warp * kPanelBytes +
                                    panel_offset(16 * step + b_row(lane), 2 * m + b_chunk(lane)));
      multiply<T>(acc, a, from + kPanels * kPanelBytes, step);
    }
  }
  float* const out = args.partial + int64_t(block_x()) * args.outputs * args.pitch;
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int output = output0 + 32 * warp + 16 * m + 8 * half + (lane >> 2);
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        const int channel = column0 + 8 * j + 2 * (lane & 3);
        if (output < args.outputs && channel < args.channels)
          global_store(out + output * args.pitch + channel,
                       float2{acc[m][j][2 * half], acc[m][j][2 * half + 1]});
      }
    }
  }
}

}  // namespace densenet_efficient
