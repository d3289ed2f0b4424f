// How norm_relu_conv3x3 cuts images into tiles and divides them over blocks, what a tile takes of
// shared memory, and the scratch that follows. Shape, element size and device decide, nothing else:
// the same call on the same device gives the same bits, and the memory plan counts the scratch
// before anything runs.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../../integers.h"
#include "../../norm_relu.h"
#include "device.h"
#include "panel.h"
#include "partials.h"

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

// The images [N, H, W] of one call.
struct Images3x3 {
  int64_t images, height, width;
};

// A tile is tile_height rows of pixels, counted through all images, by tile_width columns: the
// whole width, or a strip of it where images are wider than 64. Its halo (one row above and below,
// and `margin` columns on either side of a strip) lies in shared memory at `positions`, tile rows
// `pitch` apart. Pixels are numbered as their positions are, a strip's margins too, from the first
// after the row above on, and worked on in groups of 64.
struct Tile3x3 {
  static constexpr int kGroup = 64, kMaxGroups = 6;
  static constexpr int kMaxPositions = 1023;  // their byte offsets fill 16 bits (conv3x3/halo.cuh)
  int groups = 0;                             // 0: no tile fits the device's shared memory
  int tile_height = 0, tile_width = 0;
  int strips = 1, margin = 0, pitch = 0, positions = 0;
  int64_t tiles = 0, blocks = 0;  // blocks walk over static ranges of tiles
  int64_t shared_bytes = 0;

  // Which blocks work on the tiles.
  struct Blocks {
    int64_t most_resident = 4;  // on a multiprocessor, whatever the shared memory holds
    int64_t beside = 1;         // blocks that go over the same tiles, for other channels or outputs
    int64_t least_tiles = 1;    // of a block, where there are enough
  };

  // shared_bytes_of(positions, groups): what a tile of that size takes. Of the tiles that fit, the
  // one with which the busiest multiprocessor is done first.
  template <typename SharedBytes>
  Tile3x3(const Images3x3& of, const SharedBytes& shared_bytes_of, const Device& device,
          const Blocks& by) {
    if (of.images * of.height * of.width == 0) return;
    int64_t best = 0;
    for (int64_t pieces = ceil_div(of.width, kGroup); !best && pieces <= of.width; pieces *= 2) {
      for (int candidate = kMaxGroups; candidate > 0; --candidate) {
        Tile3x3 tile(of.images * of.height, of.width, static_cast<int>(pieces), candidate);
        if (tile.tile_height == 0) continue;
        tile.shared_bytes = shared_bytes_of(tile.positions, candidate);
        if (tile.shared_bytes > device.shared_bytes || tile.positions > kMaxPositions) continue;
        const int64_t time = tile.divide(device, by);
        if (best && time >= best) continue;
        best = time;
        *this = tile;
      }
    }
  }

 private:
  // Sets the blocks: as many as are resident at once. Returns the time that their tiles take, in
  // that of a position which has a multiprocessor for itself. What a block waits for in every tile,
  // its loads and barriers above all, costs as much as 768 positions, by times measured on an H200.
  int64_t divide(const Device& device, const Blocks& by) {
    constexpr int64_t kWait = 768;
    const int64_t resident =
        std::clamp<int64_t>(device.blocks_by_shared(shared_bytes), 1, by.most_resident);
    const int64_t most = std::max<int64_t>(1, device.multiprocessors * resident / by.beside);
    blocks = std::min(most, ceil_div(tiles, by.least_tiles));
    const int64_t turns = ceil_div(tiles, blocks);
    return turns * (kWait + ceil_div(blocks * by.beside, device.multiprocessors) * positions);
  }

  Tile3x3(int64_t image_rows, int64_t width, int pieces, int groups)
      : groups(groups), strips(pieces), margin(pieces > 1) {
    tile_width = static_cast<int>(ceil_div(width, pieces));
    pitch = tile_width + 2 * margin;
    tile_height = static_cast<int>(std::min<int64_t>(kGroup * groups / pitch, image_rows));
    positions = static_cast<int>(round_up((tile_height + 2) * pitch, 8));
    tiles = ceil_div(image_rows, tile_height) * strips;
  }
};

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

// Shared memory of the forward kernel. A stage: weight, halo. After the stages: zeros; the stages'
// norms; the warps' staging; the tile's pixels; the warps' moments.
struct ForwardLayout3x3 {
  static constexpr int kStages = 2;
  int size, columns, positions, groups;

  DE_HOST_DEVICE int halo_offset() const { return kTaps * columns * kPanelRowBytes; }
  DE_HOST_DEVICE int stage_bytes() const { return halo_offset() + positions * kPanelRowBytes; }
  DE_HOST_DEVICE int zero_offset() const { return kStages * stage_bytes(); }
  DE_HOST_DEVICE int norm_offset(int stage) const {
    return zero_offset() + kGroupZeroBytes + stage * scale_shift_bytes(size);
  }
  DE_HOST_DEVICE int staging_offset() const { return norm_offset(kStages); }
  DE_HOST_DEVICE int pixels_offset() const { return staging_offset() + groups * kStagingBytes; }
  DE_HOST_DEVICE int moments_offset() const {
    return pixels_offset() + groups * Tile3x3::kGroup * kPixelBytes;
  }
  int shared_bytes() const { return moments_offset() + groups * warp_moment_bytes(columns); }
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
        tile(of,
             [&](int positions, int groups) {
               return ForwardLayout3x3{static_cast<int>(size), columns, positions, groups}
                   .shared_bytes();
             },
             device, {}),
        weight_bytes(copies_weight ? weight_copy_bytes(of, outputs, channels, size) : 0),
        moment_bytes(stats ? partial_bytes(tile.blocks, kMomentRows, outputs, size) : 0) {}

  int64_t bytes() const { return weight_bytes + moment_bytes; }
};

// ---- Backward -----------------------------------------------------------------------------------

// Shared memory of the data gradient. A stage: weight, norm [channels][4], x and, if it is added
// to, dx. After the stages: zeros; dy; its correction; the tile's pixels; the warps' sums, twice.
struct DataGradientLayout3x3 {
  static constexpr int kStages = 2;
  int size, positions, groups, output_panels;
  bool accumulate;

  DE_HOST_DEVICE int channels() const { return panel_channels(size); }
  DE_HOST_DEVICE int norm_offset() const { return kTaps * channels() * kPanelRowBytes; }
  DE_HOST_DEVICE int x_offset() const { return norm_offset() + kBeta * channels() * 4; }
  DE_HOST_DEVICE int x_bytes() const { return groups * Tile3x3::kGroup * kPanelRowBytes; }
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
    return pixels_offset() + groups * Tile3x3::kGroup * kPixelBytes;
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

struct DataGradient3x3 {
  int output_panels;
  Tile3x3 tile;
  int64_t pitch;  // channels of a partial row
  int64_t bytes;  // the norm's sums

  DataGradient3x3(const Images3x3& of, int64_t channels, int64_t outputs, int64_t size,
                  bool accumulate, const Device& device)
      :  // A thousand panels fit no device, and more would overflow an int.
        output_panels(
            std::clamp(panels(static_cast<int>(outputs), static_cast<int>(size)), 1, 1000)),
        tile(of,
             [&](int positions, int groups) {
               return DataGradientLayout3x3{static_cast<int>(size), positions, groups,
                                            output_panels, accumulate}
                   .shared_bytes();
             },
             device, {}),
        pitch(round_up(channels, panel_channels(static_cast<int>(size)))),
        bytes(partial_bytes(tile.blocks, kNormSumRows, pitch, size)) {}
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
        tile(of,
             [&](int positions, int groups) {
               return layout(static_cast<int>(size), positions, groups).shared_bytes();
             },
             // At least two tiles a block, or the partial sums outweigh the pixels.
             device,
             {.most_resident = 2, .beside = channel_blocks * output_blocks, .least_tiles = 2}),
        pitch(channel_blocks * units * 32),
        bytes(partial_bytes(tile.blocks, kTaps * outputs, pitch, size)) {}

  WeightGradientLayout3x3 layout(int size, int positions, int groups) const {
    return {size, positions, groups, units, 16 * depths};
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
