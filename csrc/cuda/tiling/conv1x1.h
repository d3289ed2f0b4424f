// How norm_relu_conv1x1 divides its work over blocks, and the scratch that follows from it. Shape
// and device decide, nothing else: the same call on the same device gives the same bits, and the
// memory plan counts the scratch before anything runs.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../../integers.h"
#include "device.h"
#include "panel.h"
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
      // Turns that the busiest block takes, times what a row costs, by itself and for each
      // column, by times measured on an H200.
      const int64_t cost = ceil_div(candidate_tiles, most) *
                           resident(static_cast<int>(candidate_columns)) * (50 + candidate_columns);
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

// The backward's shared memory: a stage holds dz_y and y in panels of their channels, x and dx in
// panels of the warps'. After the stages comes the correction, [chunk][(outputs + 8) / chunk][4]
// (neighbouring threads own neighbouring chunks, and the channels of a chunk do not share banks),
// and the norm of the block's channels, [3][16 * warps]. `outputs`: those that the kernel is made
// for, 64, 128 or 192; `size`: bytes of an element, 2 or 4.
struct NormReluConv1x1BackwardLayout {
  static constexpr int kTileRows = 32, kPanelBytes = kTileRows * kPanelRowBytes;
  static constexpr int kNormRows = 3;  // scale, shift, mean
  int size, outputs, warps;

  // The widest kernels' third stage would not fit devices with 99 KB for a block.
  constexpr int stages() const { return size * outputs <= 256 && size == 2 ? 3 : 2; }
  constexpr int y_offset() const { return panels(outputs, size) * kPanelBytes; }
  constexpr int x_offset() const { return 2 * y_offset(); }
  constexpr int dx_offset() const { return x_offset() + panels(16 * warps, size) * kPanelBytes; }
  constexpr int stage_bytes() const { return 2 * dx_offset() - x_offset(); }
  constexpr int correction_offset() const { return stages() * stage_bytes(); }
  constexpr int correction_pitch() const { return (outputs + 8) * size; }
  constexpr int norm_offset() const { return correction_offset() + 16 / size * correction_pitch(); }
  constexpr int shared_bytes() const { return norm_offset() + kNormRows * 16 * warps * 4; }
};

// One call of the kernels: of more outputs than they take there are several calls, one after the
// other. `size`: bytes of an element, 2 or 4.
struct NormReluConv1x1Backward {
  using Layout = NormReluConv1x1BackwardLayout;
  static constexpr int64_t kTileRows = Layout::kTileRows;
  static constexpr int max_outputs(int64_t size) { return size == 2 ? 192 : 128; }
  static constexpr int together(int64_t outputs, int64_t size) {
    return outputs <= 64 ? 64 : outputs <= 128 ? 128 : max_outputs(size);
  }
  // Warps that a multiprocessor's registers hold: one block may have all of them.
  static constexpr int max_warps(int outputs, int size) { return outputs * size <= 256 ? 12 : 8; }

  int warps;               // of a block; a warp owns 16 channels
  int64_t channel_blocks;  // blocks side by side
  int64_t tiles, row_blocks;
  int64_t pitch;  // channels of a partial row
  int64_t bytes;  // dweight [outputs] and the sums of the norm, of each row block

  NormReluConv1x1Backward(int64_t rows, int64_t channels, int64_t outputs, int64_t size,
                          const Device& device) {
    const int bytes_each = static_cast<int>(size), columns = together(outputs, size);
    const int64_t groups = std::max<int64_t>(1, ceil_div(channels, 16));
    tiles = ceil_div(rows, kTileRows);
    int64_t best = 0;
    for (int most = max_warps(columns, bytes_each); most > 0; --most) {
      const int64_t beside = ceil_div(groups, most);
      // Two warps at least for more than 256 bytes of outputs: one could not load a row of dy.
      const int candidate =
          std::max(static_cast<int>(ceil_div(groups, beside)), outputs * size > 256 ? 2 : 1);
      const Layout layout{bytes_each, columns, candidate};
      const int resident = std::min(max_warps(columns, bytes_each) / candidate,
                                    device.blocks_by_shared(layout.shared_bytes()));
      if (resident == 0 && most > 1) continue;
      const int64_t blocks = int64_t(device.multiprocessors) * std::max(1, resident);
      // At least eight tiles a block, or the partial sums outweigh the rows.
      const int64_t ranges = std::min(std::max<int64_t>(1, blocks / beside), ceil_div(tiles, 8));
      // The turns of the busiest block, by what a warp executes for a tile, the wider the block the
      // less of it for the dy that its warps share, by the time of an instruction, which grows with
      // the warps of a multiprocessor; by times measured on an H200.
      const int64_t row_bytes = columns * size, turns = ranges ? ceil_div(tiles, ranges) : 1;
      const int64_t busy = ceil_div(ranges * beside, device.multiprocessors) * candidate;
      const int64_t time =
          turns * ((192 + row_bytes) * candidate + 4 * row_bytes) * (5 + busy) / candidate;
      if (best && time >= best) continue;
      best = time;
      warps = candidate;
      channel_blocks = beside;
      row_blocks = ranges;
    }
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
