// How images are cut into tiles for the 3x3 convolution: whole rows of pixels, as high as keeps the
// multiprocessors busy for the same time, and worked on by warps alone or by warps that share them.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../../integers.h"
#include "device.h"

namespace densenet_efficient::tiling {

// The images [N, H, W] of one call.
struct Images3x3 {
  int64_t images, height, width;
};

// How the warps of a block divide a tile's pixels: in groups, each of which `share` warps work on.
struct Groups3x3 {
  int pixels, share, most;  // pixels of a group; most groups of a tile
};

// Warps by themselves take many pixels with each operand of the weight: the least instructions.
// Where pixels are few, warps that share them are more, and the chain of each is shorter.
constexpr Groups3x3 kAlone{64, 1, 6};

// What so many instructions of a warp take among the warps of its multiprocessor, in sixteenths of
// a cycle: the latency of the one before, and what each warp adds (docs/predict.md). The first
// seven add less: between six and eight an H200 took the same time, and short launches of fewer
// took more than predicted.
constexpr int64_t issue_time(int64_t instructions, int64_t warps) {
  constexpr int64_t kFew = 7;
  return instructions * (64 + 3 * std::min(warps, kFew) + 7 * std::max<int64_t>(warps - kFew, 0));
}

// A tile is tile_height rows of pixels, counted through all images, by tile_width columns: the
// whole width, or a strip of it where images are wider than 64. Its halo (one row above and below,
// and `margin` columns on either side of a strip) lies in shared memory at `positions`, tile rows
// `pitch` apart. Pixels are numbered as their positions are, a strip's margins too, from the first
// after the row above on, and worked on in groups.
struct Tile3x3 {
  static constexpr int kGroup = kAlone.pixels, kMaxGroups = kAlone.most;
  static constexpr int kMaxPositions = 1023;  // their byte offsets fill 16 bits (conv3x3/halo.cuh)
  Groups3x3 division = kAlone;
  int groups = 0;  // 0: no tile fits the device's shared memory
  int tile_height = 0, tile_width = 0;
  int strips = 1, margin = 0, pitch = 0, positions = 0;
  int64_t tiles = 0, blocks = 0;  // blocks walk over static ranges of tiles
  int64_t shared_bytes = 0;
  int64_t time = 0;  // estimated, of the busiest multiprocessor

  // Which blocks work on the tiles.
  struct Blocks {
    int64_t most_resident = 4;  // on a multiprocessor, whatever the shared memory holds
    int64_t most_warps = 12;    // on a multiprocessor, by registers
    int64_t beside = 1;         // blocks that go over the same tiles, for other channels or outputs
    int64_t least_tiles = 1;    // of a block, where there are enough
  };

  int warps() const { return groups * division.share; }
  int threads() const { return 32 * warps(); }

  // Of the tiles that fit, the one with which the busiest multiprocessor is done first. A kernel
  // has its division; shared_bytes(tile), what a tile takes; and time(tile, turns, at_once): of so
  // many tiles of a block, one after the other, beside the multiprocessor's other blocks.
  template <typename Kernel>
  Tile3x3(const Images3x3& of, const Kernel& kernel, const Device& device, const Blocks& by) {
    if (of.images * of.height * of.width == 0) return;
    const Groups3x3& division = kernel.division;
    for (int64_t pieces = ceil_div(of.width, kGroup); !time && pieces <= of.width; pieces *= 2) {
      for (int candidate = division.most; candidate > 0; --candidate) {
        Tile3x3 tile(of, division, static_cast<int>(pieces));
        tile.set_height(of, division.pixels * candidate / tile.pitch);
        if (tile.tile_height == 0 || !tile.divide(kernel, device, by)) continue;
        // As many tiles as are worked on at a time are no later done where they are lower.
        const int64_t places = tile.turns() * tile.at_once(device, by) * device.multiprocessors;
        Tile3x3 lower = tile;
        lower.set_height(of, ceil_div(of.images * of.height * tile.strips * by.beside, places));
        if (lower.tile_height < tile.tile_height && lower.divide(kernel, device, by) &&
            lower.time < tile.time)
          tile = lower;
        if (!time || tile.time < time) *this = tile;
      }
    }
  }

 private:
  Tile3x3(const Images3x3& of, const Groups3x3& division, int pieces)
      : division(division), strips(pieces), margin(pieces > 1) {
    tile_width = static_cast<int>(ceil_div(of.width, pieces));
    pitch = tile_width + 2 * margin;
  }

  // Of at most so many rows of pixels, and as nearly alike as they can be.
  void set_height(const Images3x3& of, int64_t most) {
    const int64_t image_rows = of.images * of.height;
    tile_height = static_cast<int>(std::min(most, image_rows));
    if (tile_height == 0) return;
    tiles = ceil_div(image_rows, tile_height);
    tile_height = static_cast<int>(ceil_div(image_rows, tiles));
    tiles = ceil_div(image_rows, tile_height) * strips;
    groups = static_cast<int>(ceil_div(tile_height * pitch, division.pixels));
    positions = static_cast<int>(round_up((tile_height + 2) * pitch, 8));
  }

  int64_t turns() const { return ceil_div(tiles, blocks); }
  int64_t at_once(const Device& device, const Blocks& by) const {
    return ceil_div(blocks * by.beside, device.multiprocessors);
  }

  // Sets the blocks, as many as are resident at once, and the time that their tiles take. Returns
  // whether a block fits the device.
  template <typename Kernel>
  bool divide(const Kernel& kernel, const Device& device, const Blocks& by) {
    shared_bytes = kernel.shared_bytes(*this);
    if (shared_bytes > device.shared_bytes || positions > kMaxPositions) return false;
    const int64_t resident =
        std::clamp<int64_t>(std::min<int64_t>(device.blocks_by_shared(shared_bytes),
                                              by.most_warps / kernel.block_warps(*this)),
                            1, by.most_resident);
    const int64_t most = std::max<int64_t>(1, device.multiprocessors * resident / by.beside);
    blocks = std::min(most, ceil_div(tiles, by.least_tiles));
    time = kernel.time(*this, turns(), at_once(device, by));
    return true;
  }
};

// Whether the one fits the device and is done before the other, or that does not fit.
inline bool faster(const Tile3x3& one, const Tile3x3& other) {
  return one.groups && (!other.groups || one.time < other.time);
}

// Whether a call has no more pixels than warps by themselves would leave latency bare.
inline bool few_pixels(const Images3x3& of, const Device& device) {
  return of.images * of.height * of.width <= int64_t(512) * device.multiprocessors;
}

}  // namespace densenet_efficient::tiling
