// Tiles of an image with their halo in shared memory, for the 3x3 convolution: where each pixel
// lies, which of its nine neighbours exist, and what a warp reads of it.
//
// A shifted product reads the pixel's operand row from its position plus the shift. Where the
// neighbour lies outside of the image it reads a row of zeros instead: the padding is zero after
// the ReLU, and image borders inside a tile need no space of their own. The row of zeros that
// replaces a position has its number modulo eight, so that ldmatrix meets each bank once. Pixels
// are numbered as their positions are, so that one address serves rows 16 apart.
#pragma once

#include "../gemm/row_tensor.h"
#include "../tiling/conv3x3.h"

namespace densenet_efficient {

// How the warps of a block divide the rows of a panel, by eights: so many for each, and one more
// for the first ones.
struct Eights {
  int each, rest;

  Eights(int64_t rows, int warps) {
    const int64_t eights = rows / 8, among = std::max(warps, 1);
    each = static_cast<int>(eights / among);
    rest = static_cast<int>(eights % among);
  }
};

// A Tile3x3 and the images that it cuts.
struct Images {
  int64_t image_rows;  // N * H
  int height, width;
  int tile_height, tile_width, strips, margin, pitch, positions;
  int64_t tiles;
  int tile_pixels, last_pixels;  // of a tile as wide as the images, of the last such tile
  int groups, share;             // groups of pixels, and the warps of each
  int pitch_share;               // 2^16 over pitch, rounded up: divides a tile's pixels exactly
  int last_tile;
  Eights halo_eights;  // of a halo's positions, among the warps of a block
  int whole_halos;  // tiles but the first before this one have their halo's positions in the images

  Images(const tiling::Tile3x3& tile, const tiling::Images3x3& of, int warps)
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
        tile_pixels(tile_height * width),
        last_pixels(static_cast<int>((image_rows - (tiles - 1) * tile_height) * width)),
        groups(tile.groups),
        share(tile.division.share),
        pitch_share((1 << 16) / pitch + 1),
        last_tile(static_cast<int>(tiles) - 1),
        halo_eights(positions, warps),
        whole_halos(strips == 1 ? static_cast<int>(
                                      (image_rows * width + width - positions) / tile_pixels + 1)
                                : 0) {}

  // Of a tile that is as wide as the images: its pixels.
  DE_HOST_DEVICE int pixels_of(int tile) const {
    return tile == last_tile ? last_pixels : tile_pixels;
  }
  // Whether a tile is as wide as the images, and all positions of its halo are among their pixels.
  DE_HOST_DEVICE bool has_whole_halo(int tile) const { return tile > 0 && tile < whole_halos; }
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

// The pixels of a tile and its halo lie within 32 bits' worth of bytes of its first.
inline void check_near(const char* op, std::initializer_list<Strided> tensors) {
  constexpr int64_t kMost = (int64_t(1) << 31) / (tiling::Tile3x3::kMaxPositions + 1);
  for (const Strided& rows : tensors)
    if (rows && rows.stride * static_cast<int64_t>(rows.tensor->element_size()) > kMost)
      fail({op, rows.name, *rows.tensor}, "must have pixels at most ", kMost, " bytes apart, got ",
           rows.stride * static_cast<int64_t>(rows.tensor->element_size()));
}

namespace device {

using tiling::kGroupZeroBytes, tiling::kPixelBytes, tiling::kTaps, tiling::kZeroBytes;

struct TileOrigin {
  int tile;
  int64_t image_row;            // of N * H
  uint32_t image_row_in_image;  // of H
  int column;

  // Tiles are fewer than 2^31 (Images): divisions of 64 bits cost a hundred instructions.
  __device__ __forceinline__ TileOrigin(const Images& images, int tile)
      : tile(tile), image_row(int64_t(tile) * images.tile_height), column(0) {
    if (images.strips > 1) {
      image_row = int64_t(tile / images.strips) * images.tile_height;
      column = tile % images.strips * images.tile_width;
    }
    image_row_in_image = static_cast<uint32_t>(image_row) % static_cast<uint32_t>(images.height);
  }
  __device__ __forceinline__ int64_t pixel(const Images& images) const {
    return image_row * images.width + column;
  }
  // The same of a tile that is as wide as the images.
  __device__ __forceinline__ int64_t whole_pixel(const Images& images) const {
    return int64_t(tile) * images.tile_pixels;
  }
};

// A pixel of a tile: x is its distance from the tile's first pixel, in pixels of the images
// (negative where there is no pixel); y says by bit 3 (dh + 1) + dw + 1 which neighbours exist.
__device__ __forceinline__ uint2 describe_pixel(const Images& images, const TileOrigin& origin,
                                                int pixel) {
  const int row = pixel * images.pitch_share >> 16;
  const int column = pixel - row * images.pitch - images.margin, w = origin.column + column;
  if (row >= images.tile_height || origin.image_row + row >= images.image_rows ||
      static_cast<uint32_t>(column) >= static_cast<uint32_t>(images.tile_width) ||
      w >= images.width)
    return uint2{0xffffffffu, 0};
  const auto height = static_cast<uint32_t>(images.height);
  uint32_t h = origin.image_row_in_image + row;
  if (h >= height) h = images.tile_height <= images.height ? h - height : h % height;
  const uint32_t columns = (w > 0 ? 1u : 0u) | 2u | (w + 1 < images.width ? 4u : 0u);
  const uint32_t mask =
      (h > 0 ? columns : 0u) | columns << 3 | (h + 1 < height ? columns << 6 : 0u);
  return uint2{static_cast<uint32_t>(row * images.width + column), mask};
}

__device__ __forceinline__ void clear_zeros(unsigned char* zeros, int bytes, int threads) {
  for (int at = 16 * thread_index(); at < bytes; at += 16 * threads)
    shared_store(zeros + at, uint4{0, 0, 0, 0});
}

// `count` pixels of a tile, described in shared memory by the threads of the block.
__device__ __forceinline__ void describe_tile(const Images& images, const TileOrigin& origin,
                                              unsigned char* pixels, int count, int threads) {
  // Through a shuffle: what follows from the thread would be kept in registers, and spill.
  for (int p = kept(thread_index()); p < count; p += threads)
    shared_store(pixels + p * kPixelBytes, describe_pixel(images, origin, p));
}
__device__ __forceinline__ uint32_t neighbours_of(const unsigned char* pixels, int pixel) {
  return shared_load<uint32_t>(pixels + pixel * kPixelBytes + 4);
}

// A thread's part of a panel's rows: chunk lane % 4 of row lane / 4 of each of its warp's eights,
// which are neighbours. `first` of these rows, whose chunk lies at `offset` of the panel.
struct RowPart {
  int chunk, first, offset;
  int eights;
  bool one_more;

  template <typename T>
  static __device__ __forceinline__ RowPart of(const Eights& all, int thread) {
    const int lane = thread & 31, warp = thread >> 5, chunk = lane & 3;
    const int first = 8 * (warp * all.each + min(warp, all.rest)) + (lane >> 2);
    return {chunk, first, panel_offset<T>(first, chunk), all.each, all.rest && warp < all.rest};
  }
};

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
  const int runs = whole ? 1 : images.tile_height + 2;
#pragma unroll 1
  for (int r = 0; r < runs; ++r) {
    HaloRun run;
    if (whole) {
      // Of a tile's pixels only the images' first and last row have none above or below.
      const int width = images.width, pixels = images.tile_pixels + 2 * width;
      run = {0, pixels, origin.whole_pixel(images) - width, origin.tile == 0 ? width : 0,
             origin.tile == images.last_tile ? width + images.last_pixels : pixels};
    } else {
      // Divided anew, so that nothing of it is kept in registers, where it spills.
      const TileOrigin strip(images, kept(origin.tile));
      const int64_t image_row = strip.image_row - 1 + r;
      const bool exists = image_row >= 0 && image_row < images.image_rows;
      run = {r * images.pitch, images.pitch,
             image_row * images.width + strip.column - images.margin, strip.column == 0,
             exists ? images.width - strip.column + 1 : 0};
    }
    f(run);
  }
}

// A lane's operand rows of a warp's 16 kRows pixels, 16 apart: where its byte of the first one
// lies, before chunks change places, in a halo whose first byte is a multiple of kZeroBytes; and
// which neighbours of each exist.
template <int kRows>
struct OperandRows {
  int offset;
  uint32_t neighbours[kRows];

  // Moves on by so many rows of taps.
  __device__ __forceinline__ void skip_taps(int rows, int pitch) {
    offset += rows * pitch * kPanelRowBytes;
#pragma unroll
    for (int m = 0; m < kRows; ++m) neighbours[m] >>= 3 * rows;
  }
};

// `pixel`: the first of the lane's; `pixels`: of the tile; `halo`: its offset, that of a panel.
template <int kRows>
__device__ __forceinline__ OperandRows<kRows> operand_rows(const unsigned char* pixels, int pixel,
                                                           int byte, int halo, int pitch) {
  OperandRows<kRows> rows;
  rows.offset = halo + (pixel + pitch) * kPanelRowBytes + byte;
#pragma unroll
  for (int m = 0; m < kRows; ++m) rows.neighbours[m] = neighbours_of(pixels, pixel + 16 * m);
  return rows;
}

// Where the rows lie for the tap of that bit, `shift` positions on, each less its distance from the
// first: in the halo, or among the kGroupZeroBytes of zeros at `zeros`, a multiple of kZeroBytes.
template <typename T, int kRows>
__device__ __forceinline__ void tap_offsets(int (&offsets)[kRows], const OperandRows<kRows>& rows,
                                            uint32_t bit, int shift, int zeros) {
  const int row = swizzle_chunks<T>(rows.offset + shift * kPanelRowBytes);
  const int zero = zeros | (row & (kZeroBytes - 1));
#pragma unroll
  for (int m = 0; m < kRows; ++m) offsets[m] = rows.neighbours[m] & bit ? row : zero;
}

}  // namespace device
}  // namespace densenet_efficient
