// How the stem's convolution divides its work over blocks, where things lie in shared memory, and
// the scratch that follows from it.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../../integers.h"
#include "device.h"
#include "panel.h"
#include "partials.h"

namespace densenet_efficient::tiling {

// 7 x 7 windows of C channels, 2 pixels from one to the next, as rows of a matrix: a row of a
// window is 7 C neighbouring values, padded to eights, the depth of half a product's step.
struct StemWindow {
  static constexpr int kSize = 7, kStride = 2, kPadding = 3;
  int channels;

  constexpr int row_values() const { return kSize * channels; }
  constexpr int row_eights() const { return static_cast<int>(ceil_div(row_values(), 8)); }
  constexpr int steps() const { return static_cast<int>(ceil_div(kSize * row_eights(), 2)); }
  // Of an output's weights in shared memory; an odd number of 16 bytes spares bank conflicts.
  constexpr int weight_pitch() const { return 32 * steps() + 16; }
};

// A tile is some output rows by up to kColumns output columns of an image: `strips` of columns,
// `bands` of rows.
struct StemConvTiling {
  static constexpr int kColumns = 112, kRows = 8;
  // What those columns see, in pairs: two pixels each, and the five that the last window adds.
  static constexpr int kPixels = 2 * kColumns + 6;
  static constexpr int kOutputs = 32;  // outputs come in units of so many
  int64_t images, blocks;
  int height, width, out_height, out_width;
  int strips, strip_width;  // a multiple of 16
  int bands, band_height;
  int tiles;

  static constexpr int row_bytes(int64_t channels) {
    return kPixels * 2 * static_cast<int>(channels);
  }
  // The rows that a tile sees. The padding of a window's row ends within the row.
  static constexpr int input_bytes(int64_t channels) {
    return static_cast<int>(round_up((2 * kRows + 5) * row_bytes(channels), 128));
  }
  // Units of outputs of one launch's blocks: two or three; more outputs take several blocks.
  static constexpr int units(int64_t outputs) {
    return outputs <= 2 * kOutputs || ceil_div(outputs, kOutputs) % 3 ? 2 : 3;
  }

  StemConvTiling(int64_t images, int64_t height, int64_t width, int64_t most_blocks)
      : images(images),
        height(static_cast<int>(height)),
        width(static_cast<int>(width)),
        out_height(static_cast<int>((height + 1) / 2)),
        out_width(static_cast<int>((width + 1) / 2)),
        strips(static_cast<int>(ceil_div(out_width, kColumns))),
        strip_width(static_cast<int>(round_up(ceil_div(out_width, std::max(1, strips)), 16))) {
    // Lower tiles where there would be too few, though they see the same rows more often.
    int64_t lowest = kRows;
    while (lowest > 1 && images * strips * ceil_div(out_height, lowest) < most_blocks) lowest /= 2;
    bands = static_cast<int>(ceil_div(out_height, lowest));
    band_height = static_cast<int>(ceil_div(out_height, std::max(1, bands)));
    bands = static_cast<int>(ceil_div(out_height, std::max(1, band_height)));
    tiles = static_cast<int>(images * strips * bands);
    blocks = std::min<int64_t>(tiles, most_blocks);
  }
};

struct StemConvForward {
  static constexpr int kThreads = 128;
  // Blocks of a multiprocessor, by registers.
  static constexpr int resident(int64_t channels, int units) {
    return units == 2 && channels % 2 ? 3 : 2;
  }
  int units;
  int64_t output_blocks, shared_bytes;
  StemConvTiling tiling;

  StemConvForward(int64_t images, int64_t height, int64_t width, int64_t channels, int64_t outputs,
                  const Device& device)
      : units(StemConvTiling::units(outputs)),
        output_blocks(ceil_div(outputs, units * StemConvTiling::kOutputs)),
        shared_bytes(input_offset(channels, units) + StemConvTiling::input_bytes(channels)),
        tiling(images, height, width,
               int64_t(device.multiprocessors) * std::clamp(device.blocks_by_shared(shared_bytes),
                                                            1, resident(channels, units))) {}

  // The weights come first.
  static constexpr int input_offset(int64_t channels, int units) {
    return static_cast<int>(round_up(
        units * StemConvTiling::kOutputs * StemWindow{static_cast<int>(channels)}.weight_pitch(),
        128));
  }
};

struct StemConvBackwardWeight {
  static constexpr int kThreads = 32 * StemWindow::kSize;
  static constexpr int kStages = 2, kZeroBytes = 64;
  static constexpr int kPanelBytes = StemConvTiling::kColumns * kPanelRowBytes;
  // Blocks of a multiprocessor, of whose registers a block of seven warps takes those of eight.
  static constexpr int resident(int64_t channels, int units) {
    return channels == 4 && units == 3 ? 1 : 2;
  }
  int units;
  int64_t output_blocks, shared_bytes;
  StemConvTiling tiling;
  int64_t pitch;  // of a block's partial gradient
  int64_t bytes;

  StemConvBackwardWeight(int64_t images, int64_t height, int64_t width, int64_t channels,
                         int64_t outputs, const Device& device)
      : units(StemConvTiling::units(outputs)),
        output_blocks(ceil_div(outputs, units * StemConvTiling::kOutputs)),
        shared_bytes(input_offset(units) + StemConvTiling::input_bytes(channels)),
        tiling(images, height, width,
               int64_t(device.multiprocessors) *
                   std::clamp(device.blocks_by_shared(shared_bytes), 1, resident(channels, units))),
        pitch(round_up(outputs * channels * StemWindow::kSize * StemWindow::kSize, 4)),
        bytes(partial_bytes(tiling.blocks, 1, pitch, 2)) {}

  // One row of dy at each stage, 32 outputs a panel; then zeros; then what the windows see.
  static constexpr int stage_bytes(int units) { return units * kPanelBytes; }
  static constexpr int zero_offset(int units) { return kStages * stage_bytes(units); }
  static constexpr int input_offset(int units) {
    return static_cast<int>(round_up(zero_offset(units) + kZeroBytes, 128));
  }
};

}  // namespace densenet_efficient::tiling
