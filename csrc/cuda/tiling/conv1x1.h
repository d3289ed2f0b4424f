// How norm_relu_conv1x1 divides its work over blocks, and the scratch that follows from it. Shape
// and device decide, nothing else: the same call on the same device gives the same bits, and the
// memory plan counts the scratch before anything runs.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include "../../integers.h"
#include "device.h"
#include "panel.h"
#include "partials.h"

namespace densenet_efficient::tiling {

// A candidate's time, in 0.45 clocks: 15 % more where it lasts and idle multiprocessors, or few
// warps on each, make it depend on what the estimate does not know. `busiest`: tiles that the time
// of the busiest multiprocessor would do on all of them.
inline int64_t judged(int64_t time, int64_t busiest, int64_t tiles, int64_t warps) {
  constexpr int64_t kShort = 12000;
  if (time < kShort) return time;
  if (5 * busiest > 6 * tiles) time += time * 3 / 20;
  if (warps < 8) time += time * 3 / 20;
  return time;
}

// Ranges of tiles, of which no block takes more than `turns`: as few as are needed, or as many as
// fit where that puts no more blocks on a multiprocessor.
inline int64_t ranges_of(int64_t tiles, int64_t turns, int64_t most, int64_t beside,
                         const Device& device) {
  const int64_t needed = ceil_div(tiles, turns), fitting = std::min(tiles, most);
  const auto blocks = [&](int64_t ranges) {
    return ceil_div(ranges * beside, device.multiprocessors);
  };
  return blocks(fitting) == blocks(needed) ? fitting : needed;
}

struct NormReluConv1x1Forward {
  static constexpr int kWarps = 4, kWarpRows = 32;  // of the wide kernels' blocks
  static constexpr int kStages = 3;
  // Blocks on a multiprocessor, by registers.
  static constexpr int resident(int columns) { return columns > 64 ? 2 : 3; }
  // The narrow kernels' blocks: each warp has its own stages of x, weight and norm, and its sums of
  // 32 columns, whose rows are so many floats apart. Tiles of 32 rows have two stages: a third
  // would cost the third block of a multiprocessor.
  static constexpr int kNarrowPitch = 32 + 8;
  static constexpr int narrow_stages(int tile_rows) { return tile_rows > 16 ? 2 : kStages; }
  static constexpr int narrow_resident(int tile_rows, int warps) {
    return (tile_rows > 16 ? 12 : 16) / warps;
  }
  static constexpr int narrow_shared_bytes(int tile_rows, int columns, int warps, int size) {
    const int stage = (tile_rows + columns) * kPanelRowBytes + scale_shift_bytes(size);
    return warps * (narrow_stages(tile_rows) * stage + tile_rows * kNarrowPitch * 4);
  }

  bool narrow;  // whether the warps of a block divide the depth, not the tile
  int columns;  // of y per warp
  int split;    // warps side by side, which share their rows: 1 or 2; 1 if narrow
  int warps;    // of a block
  int64_t tile_rows, tiles, blocks;  // blocks: of the same columns
  int64_t bytes;                     // the moments of y

  // Wide warps normalise an element of x and read the weight least often; narrow blocks divide the
  // work among more warps, which fill the device where there are few rows.
  NormReluConv1x1Forward(int64_t rows, int64_t channels, int64_t outputs, int64_t size, bool stats,
                         const Device& device) {
    const int depth = panels(static_cast<int>(channels), static_cast<int>(size));
    Choice choice{*this, rows, outputs, device};
    const int together = outputs <= 64 ? 64 : outputs <= 128 ? 128 : 192;
    for (int side = together > 128 ? 2 : 1; side <= 2; ++side) {
      const int each = together / side;
      if (each < 64) break;
      // Instructions of a warp: of its panels of a tile, of the tile, and of its range of tiles.
      choice.consider(false, kWarpRows * kWarps / side, each, side, kWarps, resident(each),
                      (172 + 5 * each / 8) * depth + 123 + 75 * each / 8, 320 + 6 * each / 5);
    }
    struct Narrow {
      int rows, columns, warps;
    };
    for (const Narrow& one : {Narrow{32, 64, 4}, Narrow{16, 64, 4}, Narrow{16, 48, 4},
                              Narrow{16, 32, 4}, Narrow{16, 32, 8}}) {
      const int fits = device.blocks_by_shared(
          narrow_shared_bytes(one.rows, one.columns, one.warps, static_cast<int>(size)));
      if (fits == 0) continue;
      const int64_t own = ceil_div(depth, one.warps), halves = one.rows / 16;
      choice.consider(
          true, one.rows, one.columns, 1, one.warps,
          std::min(fits, narrow_resident(one.rows, one.warps)),
          (50 + 2 * one.columns + 60 * (halves - 1)) * own + (150 + 16 * one.columns / 5) * halves,
          320);
    }
    bytes = stats ? partial_bytes(blocks, kMomentRows, outputs, 4) : 0;
  }

 private:
  // The candidate of least time, and of those alike the first.
  struct Choice {
    NormReluConv1x1Forward& best;
    int64_t rows, outputs;
    const Device& device;
    int64_t least = 0;

    void consider(bool narrow, int64_t tile_rows, int columns, int split, int warps, int resident,
                  int64_t of_tile, int64_t of_range) {
      const int64_t tiles = ceil_div(rows, tile_rows);
      const int64_t beside = std::max<int64_t>(1, ceil_div(outputs, columns * split));
      const int64_t most =
          std::max<int64_t>(1, int64_t(device.multiprocessors) * resident / beside);
      const int64_t fewest = std::max<int64_t>(1, ceil_div(tiles, most));
      for (int64_t turns = fewest; turns < fewest + 3; ++turns) {
        const int64_t ranges = ranges_of(tiles, turns, most, beside, device);
        const int64_t each = ceil_div(ranges * beside, device.multiprocessors);
        const int64_t waves = std::max<int64_t>(1, ceil_div(each, resident));
        const int64_t at_once = ceil_div(each, waves);
        // A warp's instructions, by the time of each, which grows with the warps of a
        // multiprocessor; by times measured on an H200.
        const int64_t time = judged(waves * (turns * of_tile + of_range) * (5 + at_once * warps),
                                    waves * turns * at_once * device.multiprocessors,
                                    tiles * beside, at_once * warps);
        if (least && time >= least) continue;
        least = time;
        best.narrow = narrow;
        best.columns = columns;
        best.split = split;
        best.warps = warps;
        best.tile_rows = tile_rows;
        best.tiles = tiles;
        best.blocks = ranges;
      }
    }
  };
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
      const int64_t most_ranges = std::max<int64_t>(1, blocks / beside);
      // What a warp executes for a tile, the wider the block the less of it for the dy that its
      // warps share, and for its range; by times measured on an H200.
      const int64_t row_bytes = columns * size;
      const int64_t of_tile = 192 + row_bytes + 4 * row_bytes / candidate, of_range = 1050;
      const int64_t fewest = std::max<int64_t>(1, ceil_div(tiles, most_ranges));
      for (int64_t turns = fewest; turns < fewest + 8; ++turns) {
        const int64_t ranges = ranges_of(tiles, turns, most_ranges, beside, device);
        const int64_t each = ceil_div(ranges * beside, device.multiprocessors);
        const int64_t waves = std::max<int64_t>(1, ceil_div(each, std::max(1, resident)));
        const int64_t at_once = ceil_div(each, waves);
        // By the time of an instruction, which grows with the warps of a multiprocessor; and the
        // second pass over the partial sums, in the same unit: at some 20 bytes a clock of each.
        const int64_t second = ranges * (outputs + kNormSumRows) * beside * candidate * 16 * 4 /
                               (9 * device.multiprocessors);
        const int64_t time = judged(
            waves * (turns * of_tile + of_range) * (5 + at_once * candidate) + second,
            waves * turns * at_once * device.multiprocessors, tiles * beside, at_once * candidate);
        if (best && time >= best) continue;
        best = time;
        warps = candidate;
        channel_blocks = beside;
        row_blocks = ranges;
      }
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
