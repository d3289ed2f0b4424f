// How the convolution kernels divide their work over blocks, and the scratch that follows from it.
// Shape and multiprocessor count decide, nothing else: the same call on the same device gives the
// same bits, and the memory plan can count the scratch before anything runs.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../../integers.h"

namespace densenet_efficient::workspace::cuda {

// ---- norm_relu_conv1x1, forward -----------------------------------------------------------------

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
    warps = columns == 64 ? 4 : 8;
    while (warps > split && rows < 2 * tile_height() * multiprocessors) warps /= 2;
    tile_rows = tile_height();
    tiles = ceil_div(rows, tile_rows);
    const int resident_warps = columns == 64 ? 12 : 8;  // by registers, see docs/kernels.md
    blocks = std::min(tiles, int64_t(multiprocessors) * std::max(1, resident_warps / warps));
    bytes = blocks * 3 * outputs * 4;
  }
  int64_t tile_height() const { return 32 * (warps / split); }
};

// ---- norm_relu_conv1x1, backward ----------------------------------------------------------------

// `size`: bytes of an element, 2 or 4. More outputs than a kernel takes are taken in several calls.
struct Conv1x1Backward {
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
  int64_t bytes;  // dweight [outputs] and dnorm [2] rows of each row block

  Conv1x1Backward(int64_t rows, int64_t channels, int64_t outputs, int64_t size,
                  int multiprocessors) {
    constexpr int kMaxWarps = 4;
    const int64_t groups = std::max<int64_t>(1, ceil_div(channels, 16));
    channel_blocks = ceil_div(groups, kMaxWarps);
    // Two warps at least for more than 256 bytes of outputs: one could not load a row of dy.
    warps =
        std::max(static_cast<int>(ceil_div(groups, channel_blocks)), outputs * size > 256 ? 2 : 1);
    tiles = ceil_div(rows, kTileRows);
    const int64_t blocks =
        int64_t(multiprocessors) * resident(outputs, size) * std::max(1, kMaxWarps / warps);
    // At least eight tiles a block, or the partial sums outweigh the rows.
    row_blocks = std::min(std::max<int64_t>(1, blocks / channel_blocks), ceil_div(tiles, 8));
    pitch = channel_blocks * warps * 16;
    bytes = row_blocks * (outputs + 2) * pitch * 4;
  }
};

// ---- norm_relu_conv3x3 --------------------------------------------------------------------------

// Blocks that fit a multiprocessor's shared memory (a kilobyte is the system's in each); four at
// most: only the tiles of small problems are so small, and these have not many more.
constexpr int64_t kMaxResidentBlocks = 4;
inline int64_t resident_blocks(int64_t bytes, int64_t shared_limit) {
  return std::clamp<int64_t>((shared_limit + 1024) / (bytes + 1024), 1, kMaxResidentBlocks);
}

// A tile is tile_height rows of pixels, counted through all images, by tile_width columns: the
// whole width, or a strip of it where images are wider than 64. Its pixels are numbered row by row
// and worked on in groups of 64. Its halo (one row above and below, and one column beside a strip)
// lies in shared memory at `positions`, tile rows `pitch` apart.
struct Tile3x3 {
  static constexpr int kGroup = 64, kMaxGroups = 6;
  static constexpr int kMaxPositions = 1023;  // their byte offsets fill 16 bits (conv3x3/halo.cuh)
  int groups = 0;                             // 0: no tile fits the device's shared memory
  int tile_height = 0, tile_width = 0;
  int strips = 1, margin = 0, pitch = 0, positions = 0;
  int64_t tiles = 0;

  // What a tile takes of shared memory: bytes whatever its size, per position, per group of pixels.
  struct Shared {
    int64_t fixed, position, group;
  };

  Tile3x3(int64_t images, int64_t height, int64_t width, const Shared& shared, int multiprocessors,
          int64_t shared_limit) {
    const int64_t pixels = images * height * width;
    if (pixels == 0) return;
    double best = 0;
    for (int64_t pieces = ceil_div(width, kGroup); !best && pieces <= width; pieces *= 2) {
      for (int candidate = kMaxGroups; candidate > 0; --candidate) {
        const Tile3x3 tile(images * height, width, static_cast<int>(pieces), candidate);
        const int64_t bytes =
            shared.fixed + tile.positions * shared.position + candidate * shared.group;
        const bool fills = tile.tiles >= 2 * multiprocessors || candidate == 1;
        if (!fills || bytes > shared_limit || tile.positions > kMaxPositions) continue;
        // Clocks per pixel: a group's products; loading and normalising a position; and a quarter
        // more where a multiprocessor has no second block to work on while one loads.
        double cost = (7.0 * kGroup * candidate + 3.0 * tile.positions) /
                      (tile.tile_height * tile.tile_width);
        if (resident_blocks(bytes, shared_limit) < 2) cost *= 1.25;
        if (!best || cost < best) {
          best = cost;
          *this = tile;
        }
      }
    }
  }
  int64_t shared_bytes(const Shared& shared) const {
    return shared.fixed + positions * shared.position + groups * shared.group;
  }

 private:
  Tile3x3(int64_t image_rows, int64_t width, int pieces, int groups)
      : groups(groups), strips(pieces), margin(pieces > 1) {
    tile_width = static_cast<int>(ceil_div(width, pieces));
    tile_height = static_cast<int>(std::min<int64_t>(kGroup * groups / tile_width, image_rows));
    // Positions of consecutive pixels differ by one modulo eight, also from row to row.
    pitch = tile_width + (margin ? 8 : 0);
    positions = static_cast<int>(round_up((tile_height + 2) * pitch, 8));
    tiles = ceil_div(image_rows, tile_height) * strips;
  }
};

// The weight as rows of channels, of `size` bytes each, where it does not lie like that already.
inline int64_t conv3x3_weight_bytes(int64_t outputs, int64_t channels, int64_t size) {
  return outputs * 9 * round_up(channels, 16 / size) * size;
}

// Blocks walk over static ranges of tiles: as many as are resident at once.
inline int64_t conv3x3_blocks(int64_t tiles, int multiprocessors,
                              int64_t resident = kMaxResidentBlocks) {
  return std::min<int64_t>(tiles, multiprocessors * resident);
}

// The weight gradient's blocks: 64 channels (32 where there are no more), up to 48 outputs and a
// range of tiles each.
struct Conv3x3WeightGradient {
  int units;   // of 32 channels, of a block
  int depths;  // of 16 outputs, of a block
  int64_t channel_blocks, output_blocks;

  Conv3x3WeightGradient(int64_t channels, int64_t outputs) {
    units = channels <= 32 ? 1 : 2;
    depths = outputs <= 16 ? 1 : outputs <= 32 ? 2 : 3;
    channel_blocks = std::max<int64_t>(1, ceil_div(channels, 32 * units));
    output_blocks = std::max<int64_t>(1, ceil_div(outputs, 16 * depths));
  }
  int64_t pitch() const { return channel_blocks * units * 32; }
  // At least two tiles a block, or the partial sums outweigh the pixels.
  int64_t row_blocks(int64_t tiles, int multiprocessors) const {
    const int64_t resident = 2 * multiprocessors / (channel_blocks * output_blocks);
    return std::min(std::max<int64_t>(1, resident), ceil_div(tiles, 2));
  }
};

}  // namespace densenet_efficient::workspace::cuda
