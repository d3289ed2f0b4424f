// Copies of panels for the 3x3 convolution, from global to shared memory by cp.async: of its
// weight, of a tile's halo and of a tile's pixels, and how the warps of a block share them.
//
// A copy costs what its address costs. Where all rows of a panel exist, each warp has neighbouring
// rows, of which a lane copies every eighth: both addresses move on by constants, for usual rows,
// and no copy is followed by a branch. Whatever is not whole goes ways of its own.
#pragma once

#include "halo.cuh"

namespace densenet_efficient {

// Bottlenecks have 128 channels wherever growth rates are 32: rows whose distances are constants of
// the copies.
constexpr int kUsualChannels = 128;

template <typename T>
bool usual_rows(const device::RowTensor& rows) {
  return rows.stride == kUsualChannels && rows.vector == device::kChunk<T>;
}

namespace device {

// A chunk of a panel of rows: of row `row`; and of pixel `pixel` of a tile as wide as the images.
template <typename T>
__device__ __forceinline__ const unsigned char* chunk_at(const RowTensor& rows, int row, int panel,
                                                         int chunk) {
  const auto* const first = static_cast<const unsigned char*>(rows.data);
  return advance(first + (panel * kPanelRowBytes + 16 * chunk), row, row_pitch<T>(rows));
}
template <typename T>
__device__ __forceinline__ const unsigned char* pixel_at(const RowTensor& x, const Images& images,
                                                         int tile, int pixel, int panel,
                                                         int chunk) {
  return advance(chunk_at<T>(x, pixel, panel, chunk), tile, images.tile_pixels * row_pitch<T>(x));
}

// Bytes from row to row of usual_rows.
template <typename T>
constexpr int kUsualPitch = kUsualChannels * static_cast<int>(sizeof(T));

// f(count) with the count, from 1 to kMost, as a constant; nothing of 0. Compared by order:
// equality would become a table of jumps, a load and a wait.
template <int kMost, typename F>
__device__ __forceinline__ void with_constant(int count, F f) {
  if (count >= kMost) {
    f(std::integral_constant<int, kMost>{});
  } else if constexpr (kMost > 1) {
    with_constant<kMost - 1>(count, f);
  }
}

// Copies a part of a panel's rows, all of which exist, in whole chunks: `at` is the chunk in the
// first of them. kPitch: bytes from row to row, or 0 where `pitch` says them. Copies one after the
// other without a branch are the cheapest.
template <int kPitch>
__device__ __forceinline__ void copy_whole_rows(unsigned char* panel, const unsigned char* at,
                                                const RowPart& part, int pitch) {
  constexpr int kMost = kPitch ? kTaps : 4;  // at a time
  unsigned char* to = panel + part.offset;
  const auto after = [&](int i) {
    return kPitch ? at + i * 8 * kPitch : advance(at, i, 8 * pitch);
  };
  const auto copy = [&](auto count) {
#pragma unroll
    for (int i = 0; i < count; ++i) cp_async<16>(to + i * 8 * kPanelRowBytes, after(i));
  };
  int left = part.eights;
#pragma unroll 1
  for (; left > kMost; left -= kMost) {
    copy(std::integral_constant<int, kMost>{});
    at = after(kMost);
    to += kMost * 8 * kPanelRowBytes;
  }
  with_constant<kMost>(left, copy);
  if (part.one_more) cp_async<16>(to + left * 8 * kPanelRowBytes, after(left));
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

// Panels of kPixels of a tile's pixels from `first` on, without halo, zero where there is no pixel:
// a warp's, of the channels from `channel` on, `pitch` bytes from panel to panel.
template <typename T, int kPixels, int kPanels>
__device__ __forceinline__ void copy_group(unsigned char* panel, int pitch, const Images& images,
                                           int tile, const RowTensor& x, int first, int channel,
                                           int channels, int thread) {
  constexpr int kStep = 8, kRows = kPixels / kStep;  // a lane's pixels: so far apart, so many
  const int chunk = thread & 3, pixel = first + (thread >> 2 & 7);
  const int left = channels - channel - chunk * kChunk<T>;
  unsigned char* const to = panel + panel_offset<T>(pixel, chunk);
  if (images.strips == 1 && x.vector == kChunk<T> && channels % kChunk<T> == 0) {
    const unsigned char* const at =
        pixel_at<T>(x, images, tile, pixel, channel / kPanelChannels<T>, chunk);
    const int exist = images.pixels_of(tile) - pixel;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int p = 0; p < kPanels; ++p)
        cp_async<16>(to + p * pitch + kStep * i * kPanelRowBytes,
                     advance(at, i, kStep * row_pitch<T>(x)) + p * kPanelRowBytes,
                     kStep * i < exist && left > p * kPanelChannels<T> ? 16 : 0);
    }
    return;
  }
  const TileOrigin origin(images, tile);
#pragma unroll 1
  for (int i = 0; i < kRows; ++i) {
    const int offset = static_cast<int>(describe_pixel(images, origin, pixel + kStep * i).x);
    const T* const from = x.at<T>(origin.pixel(images) + offset, channel + chunk * kChunk<T>);
#pragma unroll 1
    for (int p = 0; p < kPanels; ++p)
      copy_chunk(to + p * pitch + kStep * i * kPanelRowBytes, from + p * kPanelChannels<T>,
                 offset < 0 ? 0 : left - p * kPanelChannels<T>, x.vector);
  }
}

// The same of usual rows, whose panels are all whole, and of images that are not cut into strips.
template <typename T, int kPixels, int kPanels>
__device__ __forceinline__ void copy_usual_group(unsigned char* panel, int pitch,
                                                 const Images& images, int tile, const RowTensor& x,
                                                 int first, int of_panel, int thread) {
  constexpr int kStep = 8, kRows = kPixels / kStep;
  const int chunk = thread & 3, row = thread >> 2 & 7;
  unsigned char* const to = panel + panel_offset<T>(first + row, chunk);
  const unsigned char* const at =
      advance(static_cast<const unsigned char*>(x.data) +
                  ((first + row) * kUsualPitch<T> + of_panel * kPanelRowBytes + 16 * chunk),
              tile, images.tile_pixels * kUsualPitch<T>);
  const int exist = images.pixels_of(tile) - first;
  const auto copy = [&](auto bytes_of) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int p = 0; p < kPanels; ++p)
        cp_async<16>(to + p * pitch + kStep * i * kPanelRowBytes,
                     at + kStep * i * kUsualPitch<T> + p * kPanelRowBytes,
                     bytes_of(kStep * i + row));
    }
  };
  if (exist >= kPixels)
    copy([](int) { return 16; });
  else
    copy([&](int pixel) { return pixel < exist ? 16 : 0; });
}

}  // namespace device
}  // namespace densenet_efficient
