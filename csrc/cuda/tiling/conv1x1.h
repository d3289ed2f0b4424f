// How norm_relu_conv1x1 divides its work over blocks, and the scratch that follows from it. Shape
// and device decide, nothing else: the same call on the same device gives the same bits, and the
// memory plan counts the scratch before anything runs.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../../integers.h"
#include "device.h"
#include "partials.h"

namespace densenet_efficient::tiling {

struct NormReluConv1x1Forward {
  static constexpr int kWarps = 4, kWarpRows = 32;
  // Blocks on a multiprocessor, by registers.
  static constexpr int resident(int columns) { return columns > 64 ? 2 : 3; }
  int columns;  // of y per warp
  int split;    // warps side by side, which share their rows: 1, 2 or 4
  int64_t tile_rows, tiles, blocks;
  int64_t bytes;  // the moments of y

  // Wide warps normalise an element of x and read the weight least often; narrow ones make more
  // tiles, which fill the device where there are few rows.
  NormReluConv1x1Forward(int64_t rows, int64_t outputs, bool stats, const Device& device) {
    const int together = outputs <= 64 ? 64 : outputs <= 128 ? 128 : 192;
    int64_t best = 0;
    for (int candidate = together > 128 ? 2 : 1; candidate <= kWarps; candidate *= 2) {
      const int64_t candidate_columns = together / candidate;
      const int64_t height = kWarpRows * (kWarps / candidate);
      const int64_t most =
          int64_t(device.multiprocessors) * resident(static_cast<int>(candidate_columns));
      const int64_t candidate_tiles = ceil_div(rows, height);
      // Turns that the busiest block takes, times instructions: of all columns, and of each.
      const int64_t cost = ceil_div(candidate_tiles, most) *
                           resident(static_cast<int>(candidate_columns)) *
                           (100 + candidate_columns);
      if (best && cost >= best) continue;
      best = cost;
      columns = static_cast<int>(candidate_columns);
      split = candidate;
      tile_rows = height;
      tiles = candidate_tiles;
      blocks = std::min(tiles, most);
    }
    bytes = stats ? partial_bytes(blocks, kMomentRows, outputs, 4) : 0;
  }
};

// One call of the kernels: of more outputs than they take there are several calls, one after the
// other. `size`: bytes of an element, 2 or 4.
struct NormReluConv1x1Backward {
  static constexpr int64_t kTileRows = 32;
  static constexpr int max_outputs(int64_t size) { return size == 2 ? 192 : 128; }
  // Blocks on a multiprocessor, by registers and shared memory.
  static constexpr int resident(int64_t outputs, int64_t size) {
    return outputs * size <= 256 ? 3 : 2;
  }
  int warps;               // of a block; a warp owns 16 channels
  int64_t channel_blocks;  // blocks side by side
  int64_t tiles, row_blocks;
  int64_t pitch;  // channels of a partial row
  int64_t bytes;  // dweight [outputs] and the sums of the norm, of each row block

  NormReluConv1x1Backward(int64_t rows, int64_t channels, int64_t outputs, int64_t size,
                          const Device& device) {
    constexpr int kMaxWarps = 4;
    const int64_t groups = std::max<int64_t>(1, ceil_div(channels, 16));
    channel_blocks = ceil_div(groups, kMaxWarps);
    // Two warps at least for more than 256 bytes of outputs: one could not load a row of dy.
    warps =
        std::max(static_cast<int>(ceil_div(groups, channel_blocks)), outputs * size > 256 ? 2 : 1);
    tiles = ceil_div(rows, kTileRows);
    const int64_t blocks =
        int64_t(device.multiprocessors) * resident(outputs, size) * std::max(1, kMaxWarps / warps);
    // At least eight tiles a block, or the partial sums outweigh the rows.
    row_blocks = std::min(std::max<int64_t>(1, blocks / channel_blocks), ceil_div(tiles, 8));
    pitch = channel_blocks * warps * 16;
    bytes = partial_bytes(row_blocks, outputs + kNormSumRows, pitch, 4);
  }

  // Calls f(first, outputs) for the outputs of each call of the kernels; once where there are none.
  template <typename F>
  static void for_calls(int64_t outputs, int64_t size, const F& f) {
    int64_t first = 0;
    do {
      const int64_t taken = std::min<int64_t>(outputs - first, max_outputs(size));
      f(first, taken);
      first += taken;
    } while (first < outputs);
  }

  // The most that any of the calls holds.
  static int64_t workspace_bytes(int64_t rows, int64_t channels, int64_t outputs, int64_t size,
                                 const Device& device) {
    int64_t most = 0;
    for_calls(outputs, size, [&](int64_t, int64_t taken) {
      most = std::max(most, NormReluConv1x1Backward(rows, channels, taken, size, device).bytes);
    });
    return most;
  }
};

}  // namespace densenet_efficient::tiling
