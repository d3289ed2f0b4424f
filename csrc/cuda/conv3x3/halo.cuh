// Tiles of an image with their halo in shared memory, for the 3x3 convolution: where each pixel
// lies, which of its nine neighbours exist, and how the threads of a block share the loading.
//
// A shifted product reads the pixel's operand row from its position plus the shift. Where the
// neighbour lies outside of the image it reads a row of zeros instead: the padding is zero after
// the ReLU, and image borders inside a tile need no space of their own. There are eight zero rows,
// so that the row that replaces a position has its number modulo eight, and ldmatrix meets each
// bank once.
#pragma once

#include "../gemm/row_tensor.h"
#include "../tiling/conv3x3.h"

namespace densenet_efficient {

// A Tile3x3 and the images that it cuts.
struct Images {
  int64_t image_rows;  // N * H
  int height, width;
  int tile_height, tile_width, strips, margin, pitch, positions;
  int64_t tiles;
  int groups;
  int width_share;  // 2^16 over tile_width, rounded up: divides a tile's pixels exactly

  Images(const tiling::Tile3x3& tile, const tiling::Images3x3& of)
      : image_rows(of.images * of.height),
        height(static_cast<int>(of.height)),
        width(static_cast<int>(of.width)),
        tile_height(tile.tile_height),
        tile_width(tile.tile_width),
        strips(tile.strips),
        margin(tile.margin),
        pitch(tile.pitch),
        positions(tile.positions),
        tiles(tile.tiles),
        groups(tile.groups),
        width_share((1 << 16) / tile_width + 1) {}

  // Blocks walk over static ranges of tiles: the first of a block's.
  DE_HOST_DEVICE int first_tile(int64_t block, int64_t blocks) const {
    return static_cast<int>(tiles * block / blocks);
  }
};

// x: [N, H, W, C]. Wide images are cut into strips until a tile fits, so only very many outputs do
// not.
inline void check_fits(const Arg& x, const tiling::Tile3x3& tile) {
  if (tile.groups == 0 && x.tensor.size(0) * x.tensor.size(1) * x.tensor.size(2) > 0)
    fail(x, "of shape ", shape_text(x.tensor),
         " and its outputs do not fit a tile in the device's shared memory");
}

namespace device {

using tiling::kPixelBytes, tiling::kTaps, tiling::kZeroBytes;

struct TileOrigin {
  int64_t image_row;            // of N * H
  uint32_t image_row_in_image;  // of H
  int column;

  // Tiles are fewer than 2^31 (Images): divisions of 64 bits cost a hundred instructions.
  __device__ __forceinline__ TileOrigin(const Images& images, int tile)
      : image_row(int64_t(tile) * images.tile_height), column(0) {
    if (images.strips > 1) {
      image_row = int64_t(tile / images.strips) * images.tile_height;
      column = tile % images.strips * images.tile_width;
    }
    image_row_in_image = static_cast<uint32_t>(image_row) % static_cast<uint32_t>(images.height);
  }
  __device__ __forceinline__ int64_t pixel(const Images& images) const {
    return image_row * images.width + column;
  }
};

// A pixel of a tile: x is its distance from the tile's first pixel, in pixels of the images
// (negative where there is no pixel); y its position in bytes of a panel and, from bit 16 on, which
// of its neighbours exist: bit 3 (dh + 1) + dw + 1.
__device__ __forceinline__ uint2 describe_pixel(const Images& images, const TileOrigin& origin,
                                                int pixel) {
  const int row = pixel * images.width_share >> 16, column = pixel - row * images.tile_width;
  const int64_t image_row = origin.image_row + row;
  const int w = origin.column + column;
  const uint32_t position = ((row + 1) * images.pitch + column + images.margin) * kPanelRowBytes;
  if (row >= images.tile_height || image_row >= images.image_rows || w >= images.width)
    return uint2{0xffffffffu, position % kZeroBytes};
  const uint32_t h = (origin.image_row_in_image + row) % static_cast<uint32_t>(images.height);
  const uint32_t columns = (w > 0 ? 1u : 0u) | 2u | (w + 1 < images.width ? 4u : 0u);
  const uint32_t mask = (h > 0 ? columns : 0u) | columns << 3 |
                        (h + 1 < static_cast<uint32_t>(images.height) ? columns << 6 : 0u);
  return uint2{static_cast<uint32_t>(row * images.width + column), position | mask << 16};
}

// The pixels of a tile, in groups of 64, described in shared memory by the threads of the block.
__device__ __forceinline__ void describe_tile(const Images& images, const TileOrigin& origin,
                                              unsigned char* pixels, int threads) {
  for (int p = thread_index(); p < tiling::Tile3x3::kGroup * images.groups; p += threads)
    shared_store(pixels + p * kPixelBytes, describe_pixel(images, origin, p));
}

// Neighbouring pixels of a tile's halo: `pixels` of them from `position` on, the first of which is
// the images' pixel `first`; those from begin to end exist.
struct HaloRun {
  int position, pixels;
  int64_t first;
  int begin, end;
};

// Calls f(run) for the halo's runs. A tile as wide as the images is one; a strip's rows are one
// each.
template <typename F>
__device__ __forceinline__ void for_runs(const Images& images, const TileOrigin& origin, F f) {
  const bool whole = images.strips == 1;
  const int64_t all = images.image_rows * images.width;
  const int runs = whole ? 1 : images.tile_height + 2;
  for (int r = 0; r < runs; ++r) {
    const int64_t image_row = origin.image_row - 1 + r;
    const int64_t first = image_row * images.width + origin.column - images.margin;
    HaloRun run{r * images.pitch, images.tile_width + 2, first, origin.column == 0,
                images.width - origin.column + 1};
    if (whole) {
      run.pixels = (images.tile_height + 2) * images.width;
      run.begin = first < 0 ? static_cast<int>(-first) : 0;
      run.end = static_cast<int>(min(all - first, int64_t(run.pixels)));
    } else if (image_row < 0 || image_row >= images.image_rows) {
      run.end = 0;
    }
    f(run);
  }
}

// The halo's positions that this thread loads one chunk of (chunk thread % 4), kBatch at a time:
// fetch(slot, first, at, exists) for each of the batch, which is the images' pixel first + at, then
// change() for all of them, then put(slot, position) for each.
template <int kBatch, typename Fetch, typename Change, typename Put>
__device__ __forceinline__ void for_halo(const Images& images, const TileOrigin& origin,
                                         int threads, Fetch fetch, Change change, Put put) {
  const int step = threads >> 2;
  for_runs(images, origin, [&](const HaloRun& run) {
    for (int i = thread_index() >> 2; i < run.pixels; i += kBatch * step) {
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int at = i + b * step;
        fetch(b, run.first, at, at < run.pixels && at >= run.begin && at < run.end);
      }
      change();
#pragma unroll
      for (int b = 0; b < kBatch; ++b)
        if (i + b * step < run.pixels) put(b, run.position + i + b * step);
    }
  });
}

// One panel of a tile's halo, raw, to shared memory by cp.async.
template <typename T>
__device__ __forceinline__ void copy_halo(unsigned char* halo, const Images& images,
                                          const TileOrigin& origin, const RowTensor& x, int channel,
                                          int channels, int threads) {
  for_runs(images, origin, [&](const HaloRun& run) {
    copy_rows<T>(halo, x,
                 {run.position, run.first, run.begin, run.end, run.pixels, channel, channels},
                 threads);
  });
}

// One panel of a tile's pixels, without halo, zero where there is no pixel.
template <typename T>
__device__ __forceinline__ void copy_pixels(unsigned char* panel, const Images& images,
                                            const TileOrigin& origin, const RowTensor& x,
                                            int channel, int channels, int threads) {
  const int64_t first = origin.pixel(images);
  const int rows = tiling::Tile3x3::kGroup * images.groups;
  if (images.strips == 1) {
    const int64_t left = images.image_rows * images.width - first;
    const int whole = images.tile_height * images.tile_width;
    const int end = static_cast<int>(min(int64_t(whole), left));
    copy_rows<T>(panel, x, {0, first, 0, end, rows, channel, channels}, threads);
    return;
  }
  const int chunk = thread_index() & 3;
  const int left = channels - channel - chunk * kChunk<T>;
#pragma unroll 1
  for (int p = thread_index() >> 2; p < rows; p += threads >> 2) {
    const int offset = static_cast<int>(describe_pixel(images, origin, p).x);
    copy_chunk(panel + panel_offset<T>(p, chunk),
               x.at<T>(first + offset, channel + chunk * kChunk<T>), offset < 0 ? 0 : left,
               x.vector);
  }
}

// A lane's operand row of a pixel: the described y with the lane's byte in the row added.
__device__ __forceinline__ uint32_t operand_row(const unsigned char* pixels, int pixel, int byte) {
  return shared_load<uint2>(pixels + pixel * kPixelBytes).y + byte;
}

// Its offset for the tap `bit`, at `shift` positions from its own: in the halo at `halo`, or among
// the zero rows at `zeros`.
template <typename T>
__device__ __forceinline__ int tap_offset(uint32_t row, int bit, int shift, int halo, int zeros) {
  const int offset = static_cast<int>(row & 0xffffu) + shift * kPanelRowBytes;
  const bool exists = (row >> (16 + bit)) & 1;
  return (exists ? halo : zeros) + swizzle_chunks<T>(exists ? offset : offset & (kZeroBytes - 1));
}

}  // namespace device
}  // namespace densenet_efficient
