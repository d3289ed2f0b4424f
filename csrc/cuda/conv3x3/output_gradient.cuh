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

  template <typename T>
  DE_HOST_DEVICE OutputGradient from_channel(int channel) const {
    return {dy.from_channel<T>(channel), y.data ? y.from_channel<T>(channel) : y,
            correction.data ? correction.from_channel(channel) : correction};
  }
};

namespace device {

// A halo of dy: panels, each followed by its zero rows.
__device__ __forceinline__ int gradient_panel_bytes(const Images& images) {
  return images.positions * kPanelRowBytes + kZeroBytes;
}

__device__ __forceinline__ void clear_zero_rows(unsigned char* halo, const Images& images,
                                                int panels, int threads) {
  for (int i = thread_index(); i < panels * (kZeroBytes / 16); i += threads)
    shared_store(halo + i / (kZeroBytes / 16) * gradient_panel_bytes(images) +
                     images.positions * kPanelRowBytes + i % (kZeroBytes / 16) * 16,
                 uint4{0, 0, 0, 0});
}

// The correction in shared memory, [panels][kChunk][4 chunks][a, p, q, mean], so that the four
// threads of a position read neighbours; the channels of a chunk are so far apart that they do not
// share banks. Channels past the end get zeros.
template <typename T>
constexpr int kCorrectionPitch = tiling::correction_pitch(sizeof(T));
template <typename T>
constexpr int kCorrectionBytes = tiling::correction_bytes(sizeof(T));  // of a panel

template <typename T>
__device__ __forceinline__ void load_correction(unsigned char* shared, const OutputGradient& from,
                                                int outputs, int panels, int threads) {
  if (!from.correction.data) return;
  for (int c = thread_index(); c < panels * kPanelChannels<T>; c += threads)
    shared_store(shared + c / kPanelChannels<T> * kCorrectionBytes<T> +
                     c % kChunk<T> * kCorrectionPitch<T> + c / kChunk<T> % 4 * 16,
                 kept_correction<T>(load_entries(from.correction, c, outputs)));
}

// One panel of the corrected dy of a tile and its halo, operands; channels past the end are zero.
// kBatch positions a thread are under way at a time. kWhole: all channels exist and are aligned.
template <typename T, int kBatch, bool kWhole>
__device__ __forceinline__ void load_gradient_panel(unsigned char* to,
                                                    const unsigned char* correction,
                                                    const Images& images, const TileOrigin& origin,
                                                    const OutputGradient& from, int channel,
                                                    int outputs, int threads) {
  const int chunk = thread_index() & 3, left = outputs - channel;
  const bool corrects = from.y.data != nullptr;
  const auto load = [&](const RowTensor& rows, int64_t first, int at, bool exists) {
    const T* const base = rows.at<T>(first, channel);
    const auto pitch = static_cast<int>(rows.stride) * static_cast<int>(sizeof(T));
    const T* const place = advance(base, at, pitch);
    if constexpr (kWhole)
      return exists ? global_load<uint4>(place) : uint4{0, 0, 0, 0};
    else
      return load_chunk(place, exists ? left : 0, rows.vector);
  };
  uint32_t dy[kBatch][4], y[kBatch][4];
  for_halo<kBatch>(
      images, origin, threads,
      [&](int slot, int64_t first, int at, bool exists) {
        to_array(load(from.dy, first, at, exists), dy[slot]);
        if (corrects) to_array(load(from.y, first, at, exists), y[slot]);
      },
      [&] {
        if (!corrects) {
#pragma unroll
          for (int slot = 0; slot < kBatch; ++slot) round_operands<T>(dy[slot]);
          return;
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float4 entries[kOperandChannels<T>];
#pragma unroll
          for (int k = 0; k < kOperandChannels<T>; ++k)
            entries[k] = shared_load<float4>(correction +
                                             (i * kOperandChannels<T> + k) * kCorrectionPitch<T>);
#pragma unroll
          for (int slot = 0; slot < kBatch; ++slot)
            dy[slot][i] = correct_operand<T>(dy[slot][i], y[slot][i], entries);
        }
      },
      [&](int slot, int position) {
        shared_store(to + panel_offset<T>(position, chunk),
                     uint4{dy[slot][0], dy[slot][1], dy[slot][2], dy[slot][3]});
      });
}

// All panels of it.
template <typename T, int kBatch>
__device__ __forceinline__ void load_gradient(unsigned char* halo, const unsigned char* correction,
                                              const Images& images, const TileOrigin& origin,
                                              const OutputGradient& from, int outputs, int panels,
                                              int threads) {
  const int of_chunk = (thread_index() & 3) * kChunk<T>;
  const bool aligned =
      from.dy.vector == kChunk<T> && (from.y.data == nullptr || from.y.vector == kChunk<T>);
  for (int panel = 0; panel < panels; ++panel) {
    const int channel = panel * kPanelChannels<T>;
    unsigned char* to = halo + panel * gradient_panel_bytes(images);
    const unsigned char* entries =
        correction + panel * kCorrectionBytes<T> + 16 * (thread_index() & 3);
    if (aligned && channel + kPanelChannels<T> <= outputs)
      load_gradient_panel<T, kBatch, true>(to, entries, images, origin, from, channel + of_chunk,
                                           outputs, threads);
    else
      load_gradient_panel<T, 2, false>(to, entries, images, origin, from, channel + of_chunk,
                                       outputs, threads);
  }
}

}  // namespace device
}  // namespace densenet_efficient
