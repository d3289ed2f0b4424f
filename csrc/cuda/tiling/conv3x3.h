// How the kernels of norm_relu_conv3x3 divide their work over blocks and warps, what a tile takes
// of shared memory, and the scratch that follows. Shape, element size and device decide, nothing
// else: the same call on the same device gives the same bits, and the memory plan counts the
// scratch before anything runs.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../../integers.h"
#include "../../norm_relu.h"
#include "device.h"
#include "panel.h"
#include "partials.h"
#include "tile3x3.h"

namespace densenet_efficient::tiling {

constexpr int kTaps = 9;

// Of the halo (conv3x3/halo.cuh): rows of zeros, as many as an operand's rows may differ in, those
// that a warp's 64 rows reach with one offset, and a pixel's description.
constexpr int kZeroRows = 8;
constexpr int kZeroBytes = kZeroRows * kPanelRowBytes;
constexpr int kGroupZeroBytes = (3 * 16 + kZeroRows) * kPanelRowBytes;
constexpr int kPixelBytes = 8;

// The correction of one panel of dy (conv3x3/output_gradient.cuh): four floats a channel, the
// channels of a chunk of 16 bytes so far apart that they do not share banks.
constexpr int correction_pitch(int size) { return size == 2 ? 80 : 96; }
constexpr int correction_bytes(int size) { return 16 / size * correction_pitch(size); }

// The copy of a weight [K, C, 3, 3] whose channels are not neighbours: rows of channels.
inline int64_t weight_copy_bytes(const Images3x3& of, int64_t outputs, int64_t channels,
                                 int64_t size) {
  const bool any = of.images * of.height * of.width > 0;
  return any ? outputs * kTaps * round_up(channels, 16 / size) * size : 0;
}

// ---- Forward ------------------------------------------------------------------------------------

// What is read at nine shifts, the weight that goes with it and the zeros lie at multiples of
// kZeroBytes.
DE_HOST_DEVICE constexpr int aligned(int bytes) {
  return (bytes + kZeroBytes - 1) / kZeroBytes * kZeroBytes;
}

// Warps that share pixels divide the taps by rows, and the depth of a panel in two where they are
// twice as many. One of them adds up all sums and writes.
constexpr int kTapRows = 3;
constexpr Groups3x3 kForwardShared[] = {{32, kTapRows, 4}, {32, 2 * kTapRows, 2}};

// Shared memory of the forward kernel. A stage: weight, halo; at a tile's end the sums of warps
// that share pixels. After the stages: zeros; the stages' norms; the groups' staging; the tile's
// pixels; the groups' moments.
struct ForwardLayout3x3 {
  static constexpr int kStages = 2;
  int size, columns, positions, groups, group_pixels, share;

  DE_HOST_DEVICE int halo_offset() const { return kTaps * columns * kPanelRowBytes; }
  DE_HOST_DEVICE int sums_bytes() const {
    return groups * (share - 1) * group_pixels * columns * 4;
  }
  DE_HOST_DEVICE int stage_bytes() const {
    const int operands = halo_offset() + positions * kPanelRowBytes, sums = sums_bytes();
    return operands > sums ? operands : sums;
  }
  DE_HOST_DEVICE int zero_offset() const { return kStages * stage_bytes(); }
  DE_HOST_DEVICE int norm_offset(int stage) const {
    return zero_offset() + kGroupZeroBytes + stage * scale_shift_bytes(size);
  }
  DE_HOST_DEVICE int staging_offset() const { return norm_offset(kStages); }
  DE_HOST_DEVICE int pixels_offset() const { return staging_offset() + groups * kStagingBytes; }
  DE_HOST_DEVICE int moments_offset() const {
    return pixels_offset() + groups * group_pixels * kPixelBytes;
  }
  int shared_bytes() const { return moments_offset() + groups * warp_moment_bytes(columns); }
};

// What the choice of a tile of the forward kernel goes by.
struct ForwardKernel3x3 {
  Groups3x3 division;
  int size, columns, panels;

  int block_warps(const Tile3x3& tile) const { return tile.warps(); }
  int64_t shared_bytes(const Tile3x3& tile) const {
    return ForwardLayout3x3{size,        columns,         tile.positions,
                            tile.groups, division.pixels, division.share}
        .shared_bytes();
  }
  int64_t time(const Tile3x3& tile, int64_t turns, int64_t at_once) const {
    // Of a panel: operands, products and 24 instructions for a tap's addresses; copies; the norm.
    const int64_t rows = division.pixels / 16, pairs = columns / 16, share = division.share;
    const int64_t taps = share > 1 ? kTaps / kTapRows : kTaps, steps = share > kTapRows ? 1 : 2;
    const int64_t products = taps * (steps * (rows + pairs + 2 * rows * pairs) + 8 + 4 * rows);
    const int64_t copied = 4 * (kTaps * columns + tile.positions), normalised = 4 * tile.positions;
    const int64_t panel = products + 80 + ceil_div(12 * copied + 27 * normalised, tile.threads());
    const int64_t rest = 450 + 90 * rows * pairs + 20 * (share - 1) * pairs;
    return issue_time(turns * (rest + panels * panel), at_once * tile.warps());
  }
};

struct NormReluConv3x3Forward {
  int columns;  // of y, of a block
  Tile3x3 tile;
  int64_t weight_bytes, moment_bytes;

  // copies_weight: its channels are not neighbours. stats: whether the moments of y are wanted.
  NormReluConv3x3Forward(const Images3x3& of, int64_t channels, int64_t outputs, int64_t size,
                         bool copies_weight, bool stats, const Device& device)
      : columns(outputs <= 16   ? 16
                : outputs <= 32 ? 32
                                : 48),
        tile(chosen(of, channels, outputs, static_cast<int>(size), device)),
        weight_bytes(copies_weight ? weight_copy_bytes(of, outputs, channels, size) : 0),
        moment_bytes(stats ? partial_bytes(tile.blocks, kMomentRows, outputs, size) : 0) {}

  int64_t bytes() const { return weight_bytes + moment_bytes; }

 private:
  // Sets the columns as well: of few pixels, blocks beside each other may divide them.
  Tile3x3 chosen(const Images3x3& of, int64_t channels, int64_t outputs, int size,
                 const Device& device) {
    const int depth = std::max(1, panels(static_cast<int>(channels), size));
    const auto tile = [&](const Groups3x3& division, int of_block) {
      return Tile3x3(of, ForwardKernel3x3{division, size, of_block, depth}, device,
                     {.beside = std::max<int64_t>(1, ceil_div(outputs, of_block))});
    };
    Tile3x3 best = tile(kAlone, columns);
    if (!few_pixels(of, device)) return best;
    for (int of_block = columns; of_block > 0; of_block -= 16) {
      for (const Groups3x3& division : kForwardShared) {
        const Tile3x3 other = tile(division, of_block);
        if (!faster(other, best)) continue;
        best = other;
        columns = of_block;
      }
    }
    return best;
  }
};

// ---- Backward -----------------------------------------------------------------------------------

// A panel of channels is divided among warps that share pixels, 16 channels each.
constexpr Groups3x3 data_gradient_shared(int size) {
  return {32, panel_channels(size) / 16, size == 2 ? 6 : 12};
}

// Shared memory of the data gradient. A stage: weight, norm [channels][4], x and, if it is added
// to, dx. After the stages: zeros; dy; its correction; the tile's pixels; the groups' sums, twice.
struct DataGradientLayout3x3 {
  static constexpr int kStages = 2;
  int size, positions, groups, output_panels;
  bool accumulate;
  int group_pixels;

  DE_HOST_DEVICE int channels() const { return panel_channels(size); }
  DE_HOST_DEVICE int norm_offset() const { return kTaps * channels() * kPanelRowBytes; }
  DE_HOST_DEVICE int x_offset() const { return norm_offset() + kBeta * channels() * 4; }
  DE_HOST_DEVICE int x_bytes() const { return groups * group_pixels * kPanelRowBytes; }
  DE_HOST_DEVICE int dx_offset() const { return x_offset() + x_bytes(); }
  DE_HOST_DEVICE int stage_bytes() const {
    return aligned(x_offset() + (accumulate ? 2 : 1) * x_bytes());
  }
  DE_HOST_DEVICE int zero_offset() const { return kStages * stage_bytes(); }
  DE_HOST_DEVICE int dy_offset() const { return zero_offset() + kGroupZeroBytes; }
  DE_HOST_DEVICE int correction_offset() const {
    return dy_offset() + output_panels * positions * kPanelRowBytes;
  }
  DE_HOST_DEVICE int pixels_offset() const {
    return correction_offset() + output_panels * correction_bytes(size);
  }
  DE_HOST_DEVICE int sums_offset() const {
    return pixels_offset() + groups * group_pixels * kPixelBytes;
  }
  int shared_bytes() const { return sums_offset() + 2 * groups * (kDnormRows * channels() * 4); }
};

// Shared memory of the weight gradient. A stage: x and the norm of each panel. After the stages:
// dy, zeros after each panel of it; its correction; the tile's pixels. `units` of 32 channels;
// `outputs` of a block.
struct WeightGradientLayout3x3 {
  static constexpr int kStages = 2;
  int size, positions, groups, units, outputs;

  DE_HOST_DEVICE int unit_panels() const { return 32 / panel_channels(size); }
  DE_HOST_DEVICE int panels() const { return units * unit_panels(); }
  DE_HOST_DEVICE int output_panels() const { return tiling::panels(outputs, size); }
  DE_HOST_DEVICE int x_bytes() const { return groups * Tile3x3::kGroup * kPanelRowBytes; }
  DE_HOST_DEVICE int panel_bytes() const { return x_bytes() + scale_shift_bytes(size); }
  DE_HOST_DEVICE int stage_bytes() const { return panels() * panel_bytes(); }
  DE_HOST_DEVICE int dy_offset() const { return aligned(kStages * stage_bytes()); }
  DE_HOST_DEVICE int dy_pitch() const { return positions * kPanelRowBytes + kZeroBytes; }
  DE_HOST_DEVICE int correction_offset() const {
    return dy_offset() + output_panels() * dy_pitch();
  }
  DE_HOST_DEVICE int pixels_offset() const {
    return correction_offset() + output_panels() * correction_bytes(size);
  }
  int shared_bytes() const { return pixels_offset() + groups * Tile3x3::kGroup * kPixelBytes; }

  // What a kernel needs of it, so that it computes none of it: dy after the stages.
  struct Offsets {
    int stage_bytes, panel_bytes, norm, dy, dy_pitch, zeros, correction, pixels;
  };
  Offsets offsets() const {
    return {stage_bytes(),       panel_bytes(),  x_bytes(),
            dy_offset(),         dy_pitch(),     dy_offset() + positions * kPanelRowBytes,
            correction_offset(), pixels_offset()};
  }
};

// What the choice of a tile of the data gradient goes by.
struct DataGradientKernel3x3 {
  Groups3x3 division;
  int size, output_panels, outputs, panels;  // panels: of channels, of a block
  bool accumulate;

  int block_warps(const Tile3x3& tile) const { return tile.warps(); }
  int64_t shared_bytes(const Tile3x3& tile) const {
    return DataGradientLayout3x3{size,          tile.positions, tile.groups,
                                 output_panels, accumulate,     division.pixels}
        .shared_bytes();
  }
  int64_t time(const Tile3x3& tile, int64_t turns, int64_t at_once) const {
    // Of a panel: products, copies, and what follows from its result.
    const int64_t rows = division.pixels / 16, pairs = panel_channels(size) / 16 / division.share;
    const int64_t depths = std::max<int64_t>(1, ceil_div(outputs, panel_channels(size) / 2));
    const int64_t products =
        kTaps * (depths * (rows + pairs + 2 * rows * pairs) + output_panels * (8 + 4 * rows));
    const int64_t finish = 85 * rows * pairs;
    const int64_t pixels = division.pixels * tile.groups * (accumulate ? 2 : 1);
    const int64_t copied = 4 * (depths * kTaps * panel_channels(size) / 2 + pixels);
    const int64_t panel =
        products + finish + 100 * output_panels + ceil_div(12 * copied, tile.threads());
    const int64_t gradient = ceil_div(50 * 4 * tile.positions * output_panels, tile.threads());
    return issue_time(turns * (500 + gradient + panels * panel), at_once * tile.warps());
  }
};

struct DataGradient3x3 {
  int output_panels;
  int64_t channel_blocks;  // blocks that go over the same tiles, for panels of channels each
  Tile3x3 tile;
  int64_t pitch;  // channels of a partial row
  int64_t bytes;  // the norm's sums

  DataGradient3x3(const Images3x3& of, int64_t channels, int64_t outputs, int64_t size,
                  bool accumulate, const Device& device)
      :  // A thousand panels fit no device, and more would overflow an int.
        output_panels(
            std::clamp(panels(static_cast<int>(outputs), static_cast<int>(size)), 1, 1000)),
        channel_blocks(1),
        tile(chosen(of, channels, outputs, static_cast<int>(size), accumulate, device)),
        pitch(round_up(channels, panel_channels(static_cast<int>(size)))),
        bytes(partial_bytes(tile.blocks, kNormSumRows, pitch, size)) {}

 private:
  // Sets channel_blocks as well.
  Tile3x3 chosen(const Images3x3& of, int64_t channels, int64_t outputs, int size, bool accumulate,
                 const Device& device) {
    const int of_channels = std::max(1, panels(static_cast<int>(channels), size));
    const auto kernel = [&](const Groups3x3& division, int64_t beside) {
      return DataGradientKernel3x3{division,
                                   size,
                                   output_panels,
                                   static_cast<int>(outputs),
                                   static_cast<int>(ceil_div(of_channels, beside)),
                                   accumulate};
    };
    Tile3x3 best(of, kernel(kAlone, 1), device, {});
    if (!few_pixels(of, device)) return best;
    for (int64_t beside = 1; beside <= of_channels; beside *= 2) {
      const Tile3x3 tile(of, kernel(data_gradient_shared(size), beside), device,
                         {.beside = beside});
      if (!faster(tile, best)) continue;
      best = tile;
      channel_blocks = beside;
    }
    return best;
  }
};

// What the choice of a tile of the weight gradient goes by.
struct WeightGradientKernel3x3 {
  Groups3x3 division;
  int size, units, depths;

  int block_warps(const Tile3x3&) const { return 3 * units; }
  int64_t shared_bytes(const Tile3x3& tile) const {
    return WeightGradientLayout3x3{size, tile.positions, tile.groups, units, 16 * depths}
        .shared_bytes();
  }
  // In that of a position which has a multiprocessor for itself. What a block waits for in every
  // tile, its loads and barriers above all, costs as much as 768, by times measured on an H200.
  int64_t time(const Tile3x3& tile, int64_t turns, int64_t at_once) const {
    return turns * (768 + at_once * tile.positions);
  }
};

// Blocks own 64 channels (32 where there are no more), up to 48 outputs and a range of tiles each.
struct WeightGradient3x3 {
  int units;   // of 32 channels, of a block
  int depths;  // of 16 outputs, of a block
  int64_t channel_blocks, output_blocks;
  Tile3x3 tile;
  int64_t pitch;  // channels of a partial row
  int64_t bytes;  // dweight

  WeightGradient3x3(const Images3x3& of, int64_t channels, int64_t outputs, int64_t size,
                    const Device& device)
      : units(channels <= 32 ? 1 : 2),
        depths(outputs <= 16   ? 1
               : outputs <= 32 ? 2
                               : 3),
        channel_blocks(std::max<int64_t>(1, ceil_div(channels, 32 * units))),
        output_blocks(std::max<int64_t>(1, ceil_div(outputs, 16 * depths))),
        // At least two tiles a block, or the partial sums outweigh the pixels.
        tile(of, WeightGradientKernel3x3{kAlone, static_cast<int>(size), units, depths}, device,
             {.most_resident = 2, .beside = channel_blocks * output_blocks, .least_tiles = 2}),
        pitch(channel_blocks * units * 32),
        bytes(partial_bytes(tile.blocks, kTaps * outputs, pitch, size)) {}

  WeightGradientLayout3x3 layout(int size) const {
    return {size, tile.positions, tile.groups, units, 16 * depths};
  }
};

struct NormReluConv3x3Backward {
  DataGradient3x3 data;
  WeightGradient3x3 weight;
  int64_t weight_copy_bytes, sums_bytes, dweight_bytes;

  // copies_weight: its channels are not neighbours. dweight: whether it is wanted.
  NormReluConv3x3Backward(const Images3x3& of, int64_t channels, int64_t outputs, int64_t size,
                          bool accumulate, bool copies_weight, bool dweight, const Device& device)
      : data(of, channels, outputs, size, accumulate, device),
        weight(of, channels, outputs, size, device),
        weight_copy_bytes(copies_weight ? tiling::weight_copy_bytes(of, outputs, channels, size)
                                        : 0),
        sums_bytes(data.bytes),
        dweight_bytes(dweight ? weight.bytes : 0) {}

  int64_t bytes() const { return weight_copy_bytes + sums_bytes + dweight_bytes; }
};

}  // namespace densenet_efficient::tiling
