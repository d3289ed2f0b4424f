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

  DE_HOST_DEVICE OutputGradient from_channel(int channel) const {
    return {dy.from_channel(channel), y.data ? y.from_channel(channel) : y,
            correction.data ? correction.from_channel(channel) : correction};
  }
};

namespace device {

// A halo of dy: panels of 32 channels, each with its zero rows behind it.
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

// The corrected dy of a tile and its halo, channels past the end zero. Four positions a thread are
// under way at a time.
template <typename T>
__device__ __forceinline__ void load_gradient(unsigned char* halo, const Images& images,
                                              const TileOrigin& origin, const OutputGradient& from,
                                              int outputs, int panels, int threads) {
  constexpr int kBatch = 4;
  const int chunk = thread_index() & 3;
  const bool corrects = from.y.data != nullptr;
  for (int panel = 0; panel < panels; ++panel) {
    const int channel = panel * kPanelChannels + chunk * kChunk;
    const int valid = channels_left(channel, outputs);
    float a[kChunk], p[kChunk], q[kChunk], mean[kChunk];
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const bool exists = corrects && i < valid;
      const auto entry = [&](CorrectionRow row) {
        return exists ? global_load<float>(from.correction.data + row * from.correction.stride +
                                           channel + i)
                      : 0.0f;
      };
      a[i] = entry(kA);
      p[i] = entry(kP);
      q[i] = entry(kQ);
      mean[i] = entry(kCenter);
    }
    uint4 dy[kBatch], y[kBatch];
    for_halo<kBatch>(
        images, origin, threads,
        [&](int slot, int64_t pixel, bool exists) {
          const int here = exists ? valid : 0;
          dy[slot] = load_chunk(from.dy.at<T>(pixel, channel), here, from.dy.vector);
          y[slot] = corrects ? load_chunk(from.y.at<T>(pixel, channel), here, from.y.vector)
                             : uint4{0, 0, 0, 0};
        },
        [&](int slot, int position) {
          uint32_t pairs[4] = {dy[slot].x, dy[slot].y, dy[slot].z, dy[slot].w};
          if (corrects) {
            const uint32_t values[4] = {y[slot].x, y[slot].y, y[slot].z, y[slot].w};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const float2 d = unpack<T>(pairs[i]), v = unpack<T>(values[i]);
              const int low = 2 * i, high = 2 * i + 1;
              pairs[i] = pack<T>(correct(d.x, v.x, a[low], p[low], q[low], mean[low]),
                                 correct(d.y, v.y, a[high], p[high], q[high], mean[high]));
            }
          }
          shared_store(halo + panel * gradient_panel_bytes(images) + panel_offset(position, chunk),
                       uint4{pairs[0], pairs[1], pairs[2], pairs[3]});
        });
  }
}

}  // namespace device
}  // namespace densenet_efficient
