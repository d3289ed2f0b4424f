// How transition and stem divide their work over blocks, and the scratch that follows from it.
#pragma once

#include <algorithm>
#include <cstdint>

#include "columns.h"
#include "device.h"

namespace densenet_efficient::tiling {

// ---- transition ---------------------------------------------------------------------------------

// `windows` of four pixels, of all images, are the rows of y.
struct TransitionForward {
  static constexpr int kWarps = 4, kWarpRows = 32;
  int columns;  // of y per warp
  int split;    // warps side by side
  int64_t blocks;
  int64_t bytes;  // the moments of y

  TransitionForward(int64_t windows, int64_t outputs, bool stats, const Device& device)
      : columns(outputs <= 64 ? 64 : 128), split(outputs <= 128 ? 1 : 2) {
    const int64_t tiles = ceil_div(windows, kWarps / split * kWarpRows);
    blocks = std::min<int64_t>(tiles, 2 * device.multiprocessors);
    bytes = stats ? partial_bytes(blocks, kMomentRows, outputs, 4) : 0;
  }
};

struct TransitionBackward {
  static constexpr int kTile = 128;  // windows or outputs, and channels, of a product's tile
  static constexpr int kLoads = 4;
  // Eight channels a thread would spill in the sums; two windows in flight make up for it.
  static constexpr int kSumsVector = 4;
  int vector;                    // of the pass that writes dx
  Columns sums;                  // of the windows
  int64_t channel_tiles, tiles;  // of dweight
  int64_t weight_blocks;         // over the windows, for each tile
  int64_t pitch;                 // channels of a partial row of dweight
  int64_t sums_bytes, weight_bytes;

  // dweight: whether it is wanted.
  TransitionBackward(int64_t windows, int64_t channels, int64_t outputs, int64_t size,
                     int64_t alignment, bool dweight, const Device& device)
      : vector(vector_width(channels, size, 16 / size, alignment)),
        sums(windows, channels, std::min(vector, kSumsVector), size, kLoads),
        channel_tiles(ceil_div(channels, kTile)),
        tiles(channel_tiles * ceil_div(outputs, kTile)),
        pitch(round_up(channels, 4)) {
    // Enough blocks to fill the device, at least eight depths of 32 windows for each.
    const int64_t most = std::max<int64_t>(1, ceil_div(ceil_div(windows, 32), 8));
    weight_blocks =
        std::clamp<int64_t>(2 * device.multiprocessors / std::max<int64_t>(tiles, 1), 1, most);
    const bool any = windows > 0;
    sums_bytes = any ? partial_bytes(sums.parts, kNormSumRows, channels, size) : 0;
    weight_bytes = any && dweight ? partial_bytes(weight_blocks, outputs, pitch, size) : 0;
  }
  int64_t bytes() const { return sums_bytes + weight_bytes; }
};

// ---- stem ---------------------------------------------------------------------------------------

// A block is (lanes output columns) x (vectors of channels) of one band of output rows. Backward
// blocks compute one column of windows more than they own.
struct StemTiling {
  int64_t images;
  int height, width, out_height, out_width;
  int halo;        // columns of windows computed beyond the owned ones
  int tiles;       // of owned output columns
  int tile_width;  // owned output columns
  int bands, band_height;
  Columns columns;  // of the channels; its rows are not used

  // Eight channels a thread would spill; eight bytes a lane still fill whole sectors.
  static constexpr int max_vector(int64_t size) { return size == 8 ? 2 : 4; }

  StemTiling(int64_t images, int64_t height, int64_t width, int64_t channels, int64_t size,
             int64_t alignment, int halo)
      : images(images),
        height(static_cast<int>(height)),
        width(static_cast<int>(width)),
        out_height(static_cast<int>((height + 1) / 2)),
        out_width(static_cast<int>((width + 1) / 2)),
        halo(halo),
        columns(1, channels, vector_width(channels, size, max_vector(size), alignment), size, 1) {
    constexpr int64_t kBlocks = 512;  // enough for every multiprocessor
    constexpr int kShortest = 4;      // a band reads one row more than it owns
    const int widest = columns.lanes > halo ? columns.lanes - halo : 1;
    tiles = static_cast<int>(ceil_div(out_width, widest));
    tile_width = static_cast<int>(ceil_div(out_width, std::max(1, tiles)));
    const int64_t blocks_of_a_band = std::max<int64_t>(1, images * tiles * columns.groups);
    const int64_t wanted = ceil_div(kBlocks, blocks_of_a_band);
    bands = static_cast<int>(std::clamp<int64_t>(out_height / kShortest, 1, wanted));
    band_height = static_cast<int>(std::max<int64_t>(1, ceil_div(out_height, bands)));
    bands = static_cast<int>(ceil_div(out_height, band_height));
  }
  int64_t parts() const { return images * bands * tiles; }
};

struct StemForward {
  StemTiling tiling;
  int64_t bytes;  // the moments of y

  StemForward(int64_t images, int64_t height, int64_t width, int64_t channels, int64_t size,
              int64_t alignment, bool stats)
      : tiling(images, height, width, channels, size, alignment, 0),
        bytes(stats ? partial_bytes(tiling.parts(), kMomentRows, channels, size) : 0) {}
};

struct StemBackward {
  StemTiling sums, dx;
  int64_t bytes;  // the norm's sums

  StemBackward(int64_t images, int64_t height, int64_t width, int64_t channels, int64_t size,
               int64_t alignment)
      : sums(images, height, width, channels, size, alignment, 0),
        dx(images, height, width, channels, size, alignment, 1),
        bytes(partial_bytes(sums.parts(), kNormSumRows, channels, size)) {}
};

}  // namespace densenet_efficient::tiling
