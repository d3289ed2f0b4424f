// The two products of the transition's backward on tensor cores: dpooled = dy @ weight and
// dweight = dy^T @ pooled. Both keep a block tile of 128 x 128, a warp 32 x 128, their operands in
// panels (gemm/panel.cuh), kStages deep. dpooled and pooled lie in dx, in the first and
// the second pixel of each window.
#pragma once

#include "../gemm/epilogue.cuh"
#include "../gemm/row_tensor.h"
#include "../tiling/pool.h"
#include "windows.h"

namespace densenet_efficient::transition_products {

using Tiling = tiling::TransitionBackward;

constexpr int kWarps = 4, kThreads = 32 * kWarps, kStages = 3;
constexpr int kTile = Tiling::kTile;
constexpr int kTiles = kTile / 8;
// Both operands of a stage take 8 KB: [128 rows, one panel wide], or a panel's width of rows in as
// many panels as 128 channels fill.
constexpr int kOperandBytes = kTile * device::kPanelRowBytes;
constexpr int kWarpBytes = kOperandBytes / kWarps;
constexpr int kStageBytes = 2 * kOperandBytes;

template <typename T>
constexpr int kDepthRows = device::kPanelChannels<T>;  // of a stage: two depths of the product
template <typename T>
constexpr int kPanelBytes = kDepthRows<T> * device::kPanelRowBytes;

// The i-th of the four chunks that a thread loads of kDepthRows rows of 128 channels.
template <typename T>
struct DepthChunk {
  int row, channel, offset;

  __device__ __forceinline__ explicit DepthChunk(int i) {
    using namespace device;
    const int at = kThreads / 4 * i + (thread_index() >> 2), chunk = thread_index() & 3;
    const int panel = at / kDepthRows<T>;
    row = at % kDepthRows<T>;
    channel = panel * kPanelChannels<T> + chunk * kChunk<T>;
    offset = panel * kPanelBytes<T> + panel_offset<T>(row, chunk);
  }
};

// acc += a @ b for one depth: b [kDepth, 128] lies in panels with the depth along their rows.
// kExact: 32-bit words of b are two operands, what they round to and what the rounding left.
template <typename T, bool kExact>
__device__ __forceinline__ void multiply(float (&acc)[2][kTiles][4], const uint32_t (&a)[2][4],
                                         const unsigned char* b_panels, int step) {
  using namespace device;
  constexpr bool kTwice = kExact && !kIs16Bit<T>;
  const int lane = lane_index();
  int of_b[kPointers<T>];
#pragma unroll
  for (int i = 0; i < kPointers<T>; ++i)
    of_b[i] = byte_offset<T>(kDepth<T> * step + b_depth<T>(lane, i), 0, b_byte<T>(lane));
#pragma unroll
  for (int j = 0; j < kTiles / 2; ++j) {
    uint32_t b[4];
    load_b_transposed<T>(b, b_panels + sixteen_offset<T>(j, kPanelBytes<T>), of_b,
                         sixteen_swizzle<T>(j));
    if constexpr (kTwice) {
      uint32_t residual[4];
      split_operands(b, residual);
#pragma unroll
      for (int m = 0; m < 2; ++m)
        multiply_add_pair<T>(acc[m][2 * j], acc[m][2 * j + 1], a[m], residual);
    } else {
      round_operands<T>(b);
    }
#pragma unroll
    for (int m = 0; m < 2; ++m) multiply_add_pair<T>(acc[m][2 * j], acc[m][2 * j + 1], a[m], b);
  }
}

// ---- 1. dpooled = dy @ weight -------------------------------------------------------------------

struct Product {
  device::RowTensor dy;      // [M, K]
  device::RowTensor weight;  // [K, C]
  device::RowTensor dx;      // [N * H * W, C]
  PoolWindows pool;          // M windows
  int channels;              // C
  int outputs;               // K
};

constexpr int kProductStaging = kStages * kStageBytes;
constexpr int kProductCorners = kProductStaging + kWarps * kWarpBytes;
constexpr int kProductBytes = kProductCorners + kTile * 4;

template <typename T>
__global__ void __launch_bounds__(kThreads, 2) transition_backward_product_kernel(Product args) {
  using namespace device;
  const int warp = warp_index(), lane = lane_index();
  const int load_row = thread_index() >> 2, load_chunk = thread_index() & 3;
  const int row0 = block_x() * kTile, column0 = block_y() * kTile;
  const int depths = max(1, panels_of<T>(args.outputs));
  unsigned char* const shared = shared_memory();

  const auto load = [&](int depth) {
    if (depth < depths) {
      unsigned char* const to = shared + depth % kStages * kStageBytes;
      const int output0 = depth * kDepthRows<T>, output = output0 + load_chunk * kChunk<T>;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int within = kThreads / 4 * i + load_row, row = row0 + within;
        const bool row_exists = row < args.pool.windows;
        copy_chunk(to + panel_offset<T>(within, load_chunk),
                   args.dy.at<T>(row_exists ? row : 0, output),
                   row_exists ? args.outputs - output : 0, args.dy.vector);
        const DepthChunk<T> at(i);
        const bool output_exists = output0 + at.row < args.outputs;
        copy_chunk(to + kOperandBytes + at.offset,
                   args.weight.at<T>(output_exists ? output0 + at.row : 0, column0 + at.channel),
                   output_exists ? args.channels - column0 - at.channel : 0, args.weight.vector);
      }
    }
    cp_async_commit();
  };
  for (int depth = 0; depth < kStages - 1; ++depth) load(depth);

  // Where the warp's rows go.
  int* const corners = reinterpret_cast<int*>(shared + kProductCorners) + 32 * warp;
  const int own_row = row0 + 32 * warp + lane;
  shared_store(corners + lane, own_row < args.pool.windows ? args.pool.corner(own_row) : -1);
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
        ldmatrix_x4(a[m], from + warp * kWarpBytes +
                              panel_offset<T>(16 * m + a_row(lane), 2 * step + a_chunk(lane)));
#pragma unroll
      for (int m = 0; m < 2; ++m) round_operands<T>(a[m]);
      multiply<T, false>(acc, a, from + kOperandBytes, step);
    }
  }
  WarpMoments none{nullptr, nullptr, 0.0f};
  write_rows<T, kTiles>(acc, shared + kProductStaging + warp * kWarpBytes, args.dx, 0, column0,
                        min(column0 + kTile, args.channels), false, none,
                        [&](int r) { return shared_load<int>(corners + r); });
}

// ---- 3. dweight = dy^T @ pooled -----------------------------------------------------------------

struct Weight {
  device::RowTensor dy;  // [M, K]
  device::RowTensor dx;  // [N * H * W, C], pooled in each window's second pixel
  PoolWindows pool;      // M windows
  float* partial;        // [blocks, K, pitch]
  int64_t pitch;         // C, made a multiple of four
  int channels;          // C
  int outputs;           // K
  int channel_tiles;
};

template <typename T>
__global__ void __launch_bounds__(kThreads, 2) transition_backward_weight_kernel(Weight args) {
  using namespace device;
  const int warp = warp_index(), lane = lane_index();
  const int output0 = block_y() / args.channel_tiles * kTile;
  const int column0 = block_y() % args.channel_tiles * kTile;
  const int64_t depths = (args.pool.windows + kDepthRows<T> - 1) / kDepthRows<T>;
  const int first = static_cast<int>(depths * block_x() / grid_x());
  const int last = static_cast<int>(depths * (block_x() + 1) / grid_x());
  unsigned char* const shared = shared_memory();

  const auto load = [&](int depth) {
    if (depth < last) {
      unsigned char* const to = shared + depth % kStages * kStageBytes;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const DepthChunk<T> at(i);
        const int window = kDepthRows<T> * depth + at.row;
        const bool exists = window < args.pool.windows;
        const int pixel = exists ? args.pool.corner(window) + args.pool.offset(1) : 0;
        const int output = output0 + at.channel, channel = column0 + at.channel;
        copy_chunk(to + at.offset, args.dy.at<T>(exists ? window : 0, output),
                   exists ? args.outputs - output : 0, args.dy.vector);
        copy_chunk(to + kOperandBytes + at.offset, args.dx.at<T>(pixel, channel),
                   exists ? args.channels - channel : 0, args.dx.vector);
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
      int of_a[kPointers<T>];
#pragma unroll
      for (int i = 0; i < kPointers<T>; ++i)
        of_a[i] = byte_offset<T>(kDepth<T> * step + a_depth<T>(lane, i), 0, a_byte<T>(lane));
      uint32_t a[2][4];  // the panels' channels are a's rows
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        load_a_transposed<T>(a[m], from + warp * kWarpBytes + sixteen_offset<T>(m, kPanelBytes<T>),
                             of_a, sixteen_swizzle<T>(m));
        round_operands<T>(a[m]);
      }
      multiply<T, true>(acc, a, from + kOperandBytes,
                        step);  // pooled, as the mean of four roundings
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
        if (output < args.outputs && channel < args.pitch)
          global_store(out + output * args.pitch + channel,
                       float2{acc[m][j][2 * half], acc[m][j][2 * half + 1]});
      }
    }
  }
}

}  // namespace densenet_efficient::transition_products
