// Workspaces: how many bytes of scratch each operator allocates for one call, by shape. The
// launchers allocate exactly what these functions say, and the memory plan counts it before
// anything runs.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../image.h"
#include "../integers.h"

namespace densenet_efficient::cpu::tiling {

constexpr int64_t clamp(int64_t x, int64_t low, int64_t high) {
  return std::max(low, std::min(x, high));
}

// How the CPU kernels divide their work, and the scratch that follows from it. Nothing but the
// shape and the size of an arithmetic element decides, so results do not depend on the number of
// threads; each thread has its own tile scratch.

constexpr int64_t kTileBytes = 384 << 10;   // operands of a tile: they stay in a core's L2
constexpr int64_t kPartialBytes = 4 << 20;  // all partial weight gradients of a call
constexpr int64_t kMaxGroups = 32;          // tasks, each a run of tiles with partial sums
constexpr int64_t kColumns = 256;           // columns of a backward tile
constexpr int64_t kPad = 32;                // columns are padded to whole panels

inline int64_t pad(int64_t n) { return round_up(n, kPad); }

// Tiles are shared out evenly among groups, a group's tiles run in order on one thread.
struct Groups {
  int64_t tiles, groups;
  int64_t first(int64_t group) const { return group * tiles / groups; }
};

inline Groups groups_of(int64_t tiles, int64_t most) {
  return {tiles, clamp(most, 1, std::max<int64_t>(1, std::min(tiles, kMaxGroups)))};
}

// Rows cut into tiles of equal height, as tall as the cache allows, `at_least` so many of them
// unless they would be lower than the products like.
struct RowTiles {
  int64_t rows, tile_rows, tiles;
  int64_t first(int64_t tile) const { return tile * tile_rows; }
  int64_t count(int64_t tile) const { return std::min(tile_rows, rows - first(tile)); }
};

inline RowTiles row_tiles(int64_t rows, int64_t row_bytes, int64_t tile_bytes, int64_t at_least) {
  const int64_t tallest =
      clamp(tile_bytes / std::max<int64_t>(row_bytes, 1) / 14 * 14, 28, tile_bytes / 1536);
  int64_t tiles = std::max<int64_t>(1, ceil_div(rows, tallest));
  tiles = std::max(tiles, std::min<int64_t>(at_least, rows / 28));
  if (tiles > 1) tiles = round_up(tiles, 2);
  const int64_t tile_rows = round_up(std::max<int64_t>(2, ceil_div(rows, tiles)), 2);
  return {rows, tile_rows, ceil_div(rows, tile_rows)};
}

// An image cut into planes, and these into bands of whole rows: a band with its halo of one pixel
// is a tile. A row of the halo lies in as many planes as the kernel, side by side.
struct Bands {
  Window kernel;
  int64_t planes, depth, height, band_rows, per_plane;
  int64_t tiles() const { return planes * per_plane; }

  struct Band {
    int64_t image, plane, first, rows;  // the plane within the image
  };
  Band at(int64_t tile) const {
    const int64_t plane = tile / per_plane, first = tile % per_plane * band_rows;
    return {plane / depth, plane % depth, first, std::min(band_rows, height - first)};
  }
  int64_t halo_rows(int64_t rows) const { return (rows + kernel.height - 1) * kernel.depth; }
  // Rows of a band that lie side by side without a halo between them: one product serves them all.
  int64_t joined_rows() const { return kernel.width == 1 ? band_rows : 1; }
};

inline Bands bands(const Image& x, const Window& kernel, int64_t pixel_row_bytes) {
  const int64_t planes = x.N * x.D, halo = kernel.height - 1;
  const int64_t row_bytes = std::max<int64_t>(pixel_row_bytes * kernel.depth, 1);
  const int64_t tallest = std::max<int64_t>(1, kTileBytes / row_bytes - halo);
  int64_t per_plane = std::max<int64_t>(1, ceil_div(x.H, tallest));
  while (planes * per_plane < 8 && x.H / (per_plane + 1) >= 4) ++per_plane;
  const int64_t band_rows = std::max<int64_t>(1, ceil_div(x.H, per_plane));
  return {kernel, planes,    std::max<int64_t>(1, x.D),
          x.H,    band_rows, std::max<int64_t>(1, ceil_div(x.H, band_rows))};
}

// Bytes that Workspace (parallel.h) asks torch for, so that pieces of `bytes` in all begin at a
// boundary of 64 bytes.
inline int64_t allocation_bytes(int64_t bytes) { return round_up(bytes, 64) + 64; }

// What one call allocates. `size` is the size of an arithmetic element (4, or 8 for float64), M
// rows, C input channels, K output channels. Counts are elements, a piece ends on a boundary of 64
// bytes.
constexpr int64_t kMomentRows = 2;  // of one tile's moments, per thread

inline int64_t moments_bytes(int64_t groups, int64_t channels, int64_t size, int64_t threads) {
  return 8 * groups * (2 * channels + 1) + threads * kMomentRows * channels * size + 3 * 64;
}

struct ChannelStats {
  RowTiles tiles;
  Groups groups;
  int64_t bytes;

  ChannelStats(int64_t M, int64_t C, int64_t size, int64_t threads)
      : tiles(row_tiles(M, C * size, kTileBytes, 8)),
        groups(groups_of(tiles.tiles, kMaxGroups)),
        bytes(moments_bytes(groups.groups, C, size, threads)) {}
};

// norm_relu_conv1x1_forward, and transition_forward over pooled rows.
struct ProductForward {
  RowTiles tiles;
  Groups groups;
  int64_t depth;                    // C, whole units
  int64_t weight, operand, result;  // packed weight; a thread's normalised tile and its product
  int64_t bytes;

  ProductForward(int64_t M, int64_t C, int64_t K, int64_t size, int64_t threads)
      : tiles(row_tiles(M, (C + K) * size, kTileBytes, 8)),
        groups(groups_of(tiles.tiles, kMaxGroups)),
        depth(round_up(C, 2)),
        weight(pad(K) * depth),
        operand(tiles.tile_rows * depth),
        result(tiles.tile_rows * pad(K)),
        bytes(size * (weight + threads * (operand + result)) + 3 * 64 +
              moments_bytes(groups.groups, K, size, threads)) {}
};

// norm_relu_conv1x1_backward, and transition_backward over pooled rows. A task is a group of row
// tiles and a range of columns; each group has its own weight gradient, which few rows do not pay
// for.
struct ProductBackward {
  RowTiles tiles;
  Groups groups;
  int64_t depth, columns;  // K, whole units; C, whole panels
  int64_t column_tasks;
  int64_t weight, dy, dy_units, operand, dh;  // dy .. dh per thread
  int64_t dweight;                            // per group
  int64_t bytes;

  ProductBackward(int64_t M, int64_t C, int64_t K, int64_t size, int64_t threads)
      : tiles(row_tiles(M, (2 * K + 2 * std::min(C, kColumns)) * size, 2 * kTileBytes, 2)),
        groups(
            groups_of(tiles.tiles,
                      std::min(M / 512, kPartialBytes / std::max<int64_t>(1, K * pad(C) * size)))),
        depth(round_up(K, 2)),
        columns(pad(C)),
        column_tasks(clamp(ceil_div(16, groups.groups), 1, std::max<int64_t>(1, C / 128))),
        weight(columns * depth),
        dy(tiles.tile_rows * depth),
        dy_units(tiles.tile_rows / 2 * K),
        operand(tiles.tile_rows * std::min(columns, kColumns)),
        dh(operand),
        dweight(K * columns),
        bytes(size * (weight + threads * (dy + dy_units + operand + dh + 2 * kColumns) +
                      groups.groups * dweight) +
              8 * groups.groups * 2 * C + 8 * 64) {}

  // Columns are shared out evenly, in whole panels.
  int64_t first_column(int64_t task) const { return task * (columns / kPad) / column_tasks * kPad; }
};

// What transition_backward needs in addition to ProductBackward: its correction and a row of zeros.
inline int64_t transition_correction_bytes(int64_t C, int64_t size) {
  return 5 * C * size + 2 * 64;
}

// norm_relu_conv3x3_forward: a tile is a band of an image with its halo, `width` pixels to a row of
// it.
struct Conv3x3Forward {
  Bands bands;
  Groups groups;
  int64_t width;
  int64_t weight, operand, result;  // packed weight; a thread's normalised band, one row's product
  int64_t bytes;

  Conv3x3Forward(const Image& x, int64_t C, int64_t K, int64_t size, int64_t threads)
      : bands(tiling::bands(x, x.window(3), width_of(x) * round_up(C, 2) * size)),
        groups(groups_of(bands.tiles(), kMaxGroups)),
        width(width_of(x)),
        weight(bands.kernel.size() * pad(K) * round_up(C, 2)),
        operand(bands.halo_rows(bands.band_rows) * width * round_up(C, 2)),
        result(bands.joined_rows() * x.W * pad(K)),
        bytes(size * (weight + threads * (operand + result)) + 3 * 64 +
              moments_bytes(groups.groups, K, size, threads)) {}

  static int64_t width_of(const Image& x) { return x.W + x.window(3).width - 1; }
};

// norm_relu_conv3x3_backward: columns pass in blocks of kColumns; each group has its own weight
// gradient.
struct Conv3x3Backward {
  Bands bands;
  Groups groups;
  int64_t columns;                            // C, whole panels
  int64_t width;                              // pixels to a row with its halo
  int64_t weight, dy, dy_units, operand, dh;  // dy .. dh per thread
  int64_t dweight;                            // per group
  int64_t bytes;

  Conv3x3Backward(const Image& x, int64_t C, int64_t K, int64_t size, int64_t threads)
      : bands(tiling::bands(
            x, x.window(3),
            Conv3x3Forward::width_of(x) * (std::min(pad(C), kColumns) + 2 * K) * size)),
        groups(groups_of(
            bands.tiles(),
            kPartialBytes / std::max<int64_t>(1, bands.kernel.size() * K * pad(C) * size))),
        columns(pad(C)),
        width(Conv3x3Forward::width_of(x)),
        weight(bands.kernel.size() * columns * round_up(K, 2)),
        dy(bands.halo_rows(bands.band_rows) * width * round_up(K, 2)),
        dy_units(round_up(bands.band_rows, 2) * x.W * K),
        operand(bands.halo_rows(bands.band_rows) * width * std::min(columns, kColumns)),
        dh(std::max(C, bands.joined_rows() * x.W * std::min(columns, kColumns))),
        dweight(bands.kernel.size() * K * columns),
        bytes(size * (weight + threads * (dy + dy_units + operand + dh + 2 * kColumns) +
                      groups.groups * dweight) +
              8 * groups.groups * 2 * C + 8 * 64) {}
};

// stem_forward and stem_backward: a tile is a row of windows.
struct Stem {
  Groups groups;
  int64_t width;    // C, whole vectors
  int64_t winners;  // per thread: which tap won, for a row of windows and its later neighbours
  int64_t bytes;

  Stem(const Image& x, int64_t C, int64_t size, int64_t threads)
      : groups(groups_of(x.N * x.halved_up().D * x.halved_up().H, kMaxGroups)),
        width(pad(C)),
        winners((x.D > 1 ? 4 : 2) * x.halved_up().W * width),
        bytes(moments_bytes(groups.groups, C, size, threads) +
              size * (threads * (2 * width + winners) + 4 * C) + 4 * 64) {}
};

}  // namespace densenet_efficient::cpu::tiling
