// Tiles of an image with their halo in shared memory, for the 3x3 convolution: where each pixel
// lies, which of its nine neighbours exist, and how the threads of a block share the loading.
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

// A Tile3x3 and the images that it cuts.
struct Images {
  int64_t image_rows;  // N * H
  int height, width;
  int tile_height, tile_width, strips, margin, pitch, positions;
  int64_t tiles;
  int tile_pixels, last_pixels;  // of a tile as wide as the images, of the last such tile
  int groups, share;             // groups of pixels, and the warps of each
  int pitch_share;               // 2^16 over pitch, rounded up: divides a tile's pixels exactly

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
        tile_pixels(tile_height * width),
        last_pixels(static_cast<int>((image_rows - (tiles - 1) * tile_height) * width)),
        groups(tile.groups),
        share(tile.division.share),
        pitch_share((1 << 16) / pitch + 1) {}

  // Of a tile that is as wide as the images: its pixels.
  DE_HOST_DEVICE int pixels_of(int tile) const {
    return tile + 1 == tiles ? last_pixels : tile_pixels;
  }
  // Whether a tile is as wide as the images, and all pixels of its halo are among theirs.
  DE_HOST_DEVICE bool has_whole_halo(int tile) const {
    return strips == 1 && tile > 0 && tile + 1 < tiles;
  }
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

// The pixels of a tile lie within 32 bits' worth of bytes of its first.
inline void check_near(const char* op, std::initializer_list<Strided> tensors) {
  constexpr int64_t kMost =
      (int64_t(1) << 31) / (tiling::Tile3x3::kMaxGroups * tiling::Tile3x3::kGroup);
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
             origin.tile == images.tiles - 1 ? width + images.last_pixels : pixels};
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

// A thread's part of a panel's rows: chunk thread % 4 of every (threads / 4)-th row from `first`
// on, which lies at `offset` of the panel.
struct RowPart {
  int chunk, first, step, offset;

  template <typename T>
  static __device__ __forceinline__ RowPart of(int threads) {
    const int thread = kept(thread_index()), chunk = thread & 3, first = thread >> 2;
    return {chunk, first, threads >> 2, panel_offset<T>(first, chunk)};
  }
};

// Where row `row` begins from a channel on; and pixel `pixel` of a tile as wide as the images,
// whose bytes 32 bits count.
template <typename T>
__device__ __forceinline__ const unsigned char* row_at(const RowTensor& rows, int row,
                                                       int channel) {
  return advance(
      static_cast<const unsigned char*>(rows.data) + channel * static_cast<int>(sizeof(T)), row,
      row_pitch<T>(rows));
}
template <typename T>
__device__ __forceinline__ const unsigned char* pixel_at(const RowTensor& x, const Images& images,
                                                         int tile, int pixel, int channel) {
  return advance(row_at<T>(x, pixel, channel), tile, images.tile_pixels * row_pitch<T>(x));
}

// A part of the rows [0, end), all of which exist, in whole chunks: `at` is the chunk in its first.
__device__ __forceinline__ void copy_whole_rows(unsigned char* panel, const unsigned char* at,
                                                const RowPart& part, int end, int row_pitch) {
  const int step = part.step, pitch = step * row_pitch;
  unsigned char* to = panel + part.offset;
  const auto copy = [&](int i) {
    cp_async<16>(to + i * step * kPanelRowBytes, advance(at, i, pitch));
  };
  int row = part.first;
#pragma unroll 1
  for (; row + 3 * step < end; row += 4 * step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) copy(i);
    at = advance(at, 4, pitch);
    to += 4 * step * kPanelRowBytes;
  }
  if (row < end) copy(0);
  if (row + step < end) copy(1);
  if (row + 2 * step < end) copy(2);
}

// Scale and shift of a panel all of whose channels exist.
template <typename T>
__device__ __forceinline__ void copy_whole_scale_shift(unsigned char* shared, const Table& norm,
                                                       int channel, int threads) {
  const int pitch = 4 * static_cast<int>(norm.stride);
#pragma unroll 1
  for (int i = thread_index(); i < 2 * kPanelChannels<T>; i += threads)
    cp_async<4>(shared + scale_shift_offset(i >> 1) + 4 * (i & 1),
                advance(norm.data + channel + (i >> 1), kScale + (i & 1), pitch));
}

// copy_rows where both addresses only move on from row to row and rows that do not exist are copies
// of nothing, which leave zeros: the least instructions where a tile's rows are few for a thread.
template <typename T>
__device__ __forceinline__ void copy_tile_rows(unsigned char* panel, const RowTensor& from,
                                               const RowCopy& copy, int threads) {
  const int chunk = thread_index() & 3, first = thread_index() >> 2, step = threads >> 2;
  const int left = copy.channels - copy.channel - chunk * kChunk<T>;
  unsigned char* to = panel + panel_offset<T>(copy.position + first, chunk);
  const unsigned char* at = row_bytes<T>(from, copy.row0, first, copy.channel + chunk * kChunk<T>);
  const uint32_t stride = step * row_pitch<T>(from);
  // Rows are counted from the first that exists.
  const int end = copy.rows - copy.begin;
  int row = first - copy.begin;
  const auto next = [&] {
    row += step;
    to += step * kPanelRowBytes;
    at += stride;
  };
  if (from.vector == kChunk<T> && (left >= kChunk<T> || left <= 0)) {
    const auto exist = static_cast<uint32_t>(left > 0 ? max(copy.end - copy.begin, 0) : 0);
    const auto copy_next = [&] {
      cp_async<16>(to, at, static_cast<uint32_t>(row) < exist ? 16 : 0);
      next();
    };
#pragma unroll 1
    while (row + 3 * step < end) {
#pragma unroll
      for (int i = 0; i < 4; ++i) copy_next();
    }
    if (row + step < end) {
      copy_next();
      copy_next();
    }
    if (row < end) copy_next();
    return;
  }
#pragma unroll 1
  for (; row < end; next())
    copy_chunk(to, reinterpret_cast<const T*>(at),
               row >= 0 && row < copy.end - copy.begin ? left : 0, from.vector);
}

// One panel of a tile's halo, raw, to shared memory by cp.async.
template <typename T>
__device__ __forceinline__ void copy_halo(unsigned char* halo, const Images& images,
                                          const TileOrigin& origin, const RowTensor& x, int channel,
                                          int channels, int threads) {
  for_runs(images, origin, [&](const HaloRun& run) {
    copy_tile_rows<T>(halo, x,
                      {run.position, run.first, run.begin, run.end, run.pixels, channel, channels},
                      threads);
  });
}

// One panel of kPixels of a tile's pixels from `first` on, without halo, zero where there is no
// pixel: a warp's.
template <typename T, int kPixels>
__device__ __forceinline__ void copy_group(unsigned char* panel, const Images& images, int tile,
                                           const RowTensor& x, int first, int channel,
                                           int channels) {
  constexpr int kStep = 8, kRows = kPixels / kStep;  // a lane's pixels: so far apart, so many
  const int lane = lane_index(), chunk = lane & 3;
  const int pixel = first + (lane >> 2);
  const int left = channels - channel - chunk * kChunk<T>;
  unsigned char* const to = panel + panel_offset<T>(pixel, chunk);
  if (images.strips == 1 && x.vector == kChunk<T> && (left >= kChunk<T> || left <= 0)) {
    const unsigned char* at = pixel_at<T>(x, images, tile, pixel, channel + chunk * kChunk<T>);
    const int exist = left > 0 ? images.pixels_of(tile) - pixel : 0;
    const uint32_t step = kStep * row_pitch<T>(x);
#pragma unroll
    for (int i = 0; i < kRows; ++i, at += step)
      cp_async<16>(to + kStep * i * kPanelRowBytes, at, kStep * i < exist ? 16 : 0);
    return;
  }
  const TileOrigin origin(images, tile);
#pragma unroll 1
  for (int i = 0; i < kRows; ++i) {
    const int offset = static_cast<int>(describe_pixel(images, origin, pixel + kStep * i).x);
    copy_chunk(to + kStep * i * kPanelRowBytes,
               x.at<T>(origin.pixel(images) + offset, channel + chunk * kChunk<T>),
               offset < 0 ? 0 : left, x.vector);
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
