// What both kernels of the 3x3 convolution's backward share: the gradient dy with its deferred
// correction, formed once for a tile and its halo.
#pragma once

#include "halo.cuh"

namespace densenet_efficient {

// dy [M, K]; where y is given, a * dy - p - (y - mean) * q takes its place.
struct OutputGradient {
  device::RowTensor dy;      // [M, K]
  device::RowTensor y;       // [M, K]; data null without a correction
  device::Table correction;  // [4, K]
};

namespace device {

// The correction in shared memory, [panels][kChunk][4 chunks][a, p, q, mean], so that the four
// threads of a position read neighbours; the channels of a chunk are so far apart that they do not
// share banks. Channels past the end get zeros.
template <typename T>
constexpr int kCorrectionPitch = tiling::correction_pitch(sizeof(T));
template <typename T>
constexpr int kCorrectionBytes = tiling::correction_bytes(sizeof(T));  // of a panel

template <typename T>
__device__ __forceinline__ void load_correction(unsigned char* shared, const OutputGradient& from,
                                                int output0, int end, int panels, int threads) {
  if (!from.correction.data) return;
  for (int c = thread_index(); c < panels * kPanelChannels<T>; c += threads)
    shared_store(shared + c / kPanelChannels<T> * kCorrectionBytes<T> +
                     c % kChunk<T> * kCorrectionPitch<T> + c / kChunk<T> % 4 * 16,
                 kept_correction<T>(load_entries(from.correction, output0 + c, end)));
}

// One panel of the corrected dy of a tile and its halo, operands; channels past the end are zero.
// kBatch positions a thread are under way at a time. kPiece: bytes that every row is aligned to and
// its channels are whole pieces of: 16, 8, or none if it is 0.
template <typename T, int kBatch, int kPiece>
__device__ __forceinline__ void load_gradient_panel(unsigned char* to,
                                                    const unsigned char* correction,
                                                    const Images& images, const TileOrigin& origin,
                                                    const OutputGradient& from, int channel,
                                                    int end, int threads) {
  const int chunk = thread_index() & 3, step = threads >> 2;
  const int left = end - channel;
  const bool corrects = from.y.data != nullptr;
  const auto load = [](const unsigned char* at, int left, int vector) {
    if constexpr (kPiece == 16) {
      return left > 0 ? global_load<uint4>(at) : uint4{0, 0, 0, 0};
    } else if constexpr (kPiece == 8) {
      const uint2 low = left > 0 ? global_load<uint2>(at) : uint2{0, 0};
      const uint2 high = left > kHalf<T> ? global_load<uint2>(at + 8) : uint2{0, 0};
      return uint4{low.x, low.y, high.x, high.y};
    } else {
      return load_chunk(reinterpret_cast<const T*>(at), left, vector);
    }
  };
  for_runs(images, origin, [&](const HaloRun& run) {
    // Rows are counted from the first that exists; a step is a multiple of eight, so that chunks
    // keep their order.
    const int first = thread_index() >> 2, last = run.pixels - run.begin;
    const auto exist = static_cast<uint32_t>(max(run.end - run.begin, 0));
    const auto* of_dy = row_bytes<T>(from.dy, run.first, first, channel);
    const auto* of_y = row_bytes<T>(corrects ? from.y : from.dy, run.first, first, channel);
    unsigned char* place = to + panel_offset<T>(run.position + first, chunk);
#pragma unroll 1
    for (int row = first - run.begin; row < last; row += kBatch * step) {
      uint32_t dy[kBatch][4], y[kBatch][4];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const bool exists = static_cast<uint32_t>(row + b * step) < exist;
        to_array(load(of_dy, exists ? left : 0, from.dy.vector), dy[b]);
        if (corrects) to_array(load(of_y, exists ? left : 0, from.y.vector), y[b]);
        of_dy = advance(of_dy, step, row_pitch<T>(from.dy));
        of_y = advance(of_y, step, row_pitch<T>(from.y));
      }
      if (corrects) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float4 entries[kOperandChannels<T>];
#pragma unroll
          for (int k = 0; k < kOperandChannels<T>; ++k)
            entries[k] = shared_load<float4>(correction +
                                             (i * kOperandChannels<T> + k) * kCorrectionPitch<T>);
#pragma unroll
          for (int b = 0; b < kBatch; ++b)
            dy[b][i] = correct_operand<T>(dy[b][i], y[b][i], entries);
        }
      } else {
#pragma unroll
        for (int b = 0; b < kBatch; ++b) round_operands<T>(dy[b]);
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        if (row + b * step < last)
          shared_store(place, uint4{dy[b][0], dy[b][1], dy[b][2], dy[b][3]});
        place += step * kPanelRowBytes;
      }
    }
  });
}

// The same of a tile all positions of whose halo are pixels of the images, of rows of whole chunks,
// with a correction. Its warps share the positions as they share those that they copy.
template <typename T, int kBatch>
__device__ __forceinline__ void load_whole_gradient_panel(unsigned char* to,
                                                          const unsigned char* correction,
                                                          const Images& images, int tile,
                                                          const OutputGradient& from, int channel,
                                                          int thread) {
  const RowPart part = RowPart::of<T>(images.halo_eights, thread);
  const int first = part.first - images.width, of_dy = row_pitch<T>(from.dy),
            of_y = row_pitch<T>(from.y);
  const auto* dy =
      advance(row_bytes<T>(from.dy, 0, first, channel), tile, images.tile_pixels * of_dy);
  const auto* y = advance(row_bytes<T>(from.y, 0, first, channel), tile, images.tile_pixels * of_y);
  to += part.offset;
  const auto form = [&](auto count) {
    uint32_t dz[count][4], values[count][4];
#pragma unroll
    for (int b = 0; b < count; ++b) {
      to_array(global_load<uint4>(advance(dy, b, 8 * of_dy)), dz[b]);
      to_array(global_load<uint4>(advance(y, b, 8 * of_y)), values[b]);
    }
    dy = advance(dy, count, 8 * of_dy);
    y = advance(y, count, 8 * of_y);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float4 entries[kOperandChannels<T>];
#pragma unroll
      for (int k = 0; k < kOperandChannels<T>; ++k)
        entries[k] =
            shared_load<float4>(correction + (i * kOperandChannels<T> + k) * kCorrectionPitch<T>);
#pragma unroll
      for (int b = 0; b < count; ++b)
        dz[b][i] = correct_operand<T>(dz[b][i], values[b][i], entries);
    }
#pragma unroll
    for (int b = 0; b < count; ++b)
      shared_store(to + b * 8 * kPanelRowBytes, uint4{dz[b][0], dz[b][1], dz[b][2], dz[b][3]});
    to += count * 8 * kPanelRowBytes;
  };
  int left = part.eights + (part.one_more ? 1 : 0);
#pragma unroll 1
  for (; left >= kBatch; left -= kBatch) form(std::integral_constant<int, kBatch>{});
#pragma unroll 1
  for (; left > 0; --left) form(std::integral_constant<int, 1>{});
}

// All panels of it, `pitch` bytes apart, from channel `output0` on, up to `end`.
template <typename T, int kBatch>
__device__ __forceinline__ void load_gradient(unsigned char* halo, int pitch,
                                              const unsigned char* correction, const Images& images,
                                              const TileOrigin& origin, const OutputGradient& from,
                                              int output0, int end, int panels, int threads) {
  const int of_chunk = (thread_index() & 3) * kChunk<T>;
  const int vector = from.y.data ? min(from.dy.vector, from.y.vector) : from.dy.vector;
  for (int panel = 0; panel < panels; ++panel) {
    const int channel = output0 + panel * kPanelChannels<T>;
    unsigned char* to = halo + panel * pitch;
    const unsigned char* entries =
        correction + panel * kCorrectionBytes<T> + 16 * (thread_index() & 3);
    if (images.has_whole_halo(origin.tile) && from.y.data && vector == kChunk<T> &&
        channel + kPanelChannels<T> <= end) {
      load_whole_gradient_panel<T, kBatch>(to, entries, images, origin.tile, from,
                                           channel + of_chunk, kept(thread_index()));
      continue;
    }
    const auto load = [&](auto piece) {
      load_gradient_panel<T,
                          piece == 16  ? kBatch
                          : piece == 8 ? kBatch / 2
                                       : 1,
                          piece>(to, entries, images, origin, from, channel + of_chunk, end,
                                 threads);
    };
    if (vector == kChunk<T> && end % kChunk<T> == 0)
      load(std::integral_constant<int, 16>{});
    else if (vector >= kHalf<T> && end % kHalf<T> == 0)
      load(std::integral_constant<int, 8>{});
    else
      load(std::integral_constant<int, 0>{});
  }
}

}  // namespace device
}  // namespace densenet_efficient
