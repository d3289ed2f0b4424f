// How the convolution kernels divide their work over blocks, and the scratch that follows from it.
// Shape and multiprocessor count decide, nothing else: the same call on the same device gives the
// same bits, and the memory plan can count the scratch before anything runs.
#pragma once

#include <algorithm>
#include <cstdint>

namespace densenet_efficient::workspace::cuda {

inline int64_t parts(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t padded(int64_t a, int64_t b) { return parts(a, b) * b; }

// ---- norm_relu_conv1x1, forward ---------------------------------------------------------------------

struct Conv1x1Forward {
  int columns;  // of y per warp
  int split;    // warps side by side
  int warps;    // of a block
  int64_t tile_rows, tiles, blocks;
  int64_t bytes;  // count, mean, M2 of each column and block

  Conv1x1Forward(int64_t rows, int64_t outputs, int multiprocessors) {
    columns = outputs <= 64 ? 64 : outputs <= 128 ? 128 : 96;
    split = outputs <= 128 ? 1 : 2;
    // Tall blocks read the weight less often; short ones fill the device when there are few rows.
    warps = 8;
    while (warps > split && rows < 2 * tile_height() * multiprocessors) warps /= 2;
    tile_rows = tile_height();
    tiles = parts(rows, tile_rows);
    const int resident_warps = columns == 64 ? 16 : 8;  // by registers, see docs/kernels.md
    blocks = std::min(tiles, int64_t(multiprocessors) * std::max(1, resident_warps / warps));
    bytes = blocks * 3 * outputs * 4;
  }
  int64_t tile_height() const { return 32 * (warps / split); }
};

// ---- norm_relu_conv1x1, backward --------------------------------------------------------------------

// For at most 192 outputs; more are taken in several calls of the kernel.
struct Conv1x1Backward {
  static constexpr int64_t kTileRows = 32, kMaxOutputs = 192;
  int warps;               // of a block; a warp owns 16 channels
  int64_t channel_blocks;  // blocks side by side
  int64_t tiles, row_blocks;
  int64_t pitch;  // channels of a partial row
  int64_t bytes;  // dweight [outputs] and dnorm [2] rows of each row block

  Conv1x1Backward(int64_t rows, int64_t channels, int64_t outputs, int multiprocessors) {
    constexpr int kMaxWarps = 4;
    const int64_t groups = std::max<int64_t>(1, parts(channels, 16));
    channel_blocks = parts(groups, kMaxWarps);
    // Two warps at least for more than 128 outputs: fewer threads could not load a row of dy.
    warps = std::max(static_cast<int>(parts(groups, channel_blocks)), outputs > 128 ? 2 : 1);
    tiles = parts(rows, kTileRows);
    const int64_t resident =
        int64_t(multiprocessors) * (outputs <= 128 ? 3 : 2) * std::max(1, kMaxWarps / warps);
    // At least eight tiles a block, or the partial sums outweigh the rows.
    row_blocks = std::min(std::max<int64_t>(1, resident / channel_blocks), parts(tiles, 8));
    pitch = channel_blocks * warps * 16;
    bytes = row_blocks * (outputs + 2) * pitch * 4;
  }
};

}  // namespace densenet_efficient::workspace::cuda
