// The 1x1 convolution's forward: its arguments, and how a warp multiplies a panel. The operator is
// described in norm_relu_conv1x1_forward.cu.
#pragma once

#include "../gemm/row_tensor.h"
#include "../tiling/conv1x1.h"

namespace densenet_efficient::conv1x1_forward {

using Tiling = tiling::NormReluConv1x1Forward;

constexpr int kStages = Tiling::kStages;

struct Forward {
  device::RowTensor x;       // [M, C]
  device::Table norm;        // [5, C]
  device::RowTensor weight;  // [K, C]
  device::RowTensor y;       // [M, K]
  float* partial;            // [ranges, 3, K]: count, mean, M2; null without stats
  int64_t rows;              // M
  int channels;              // C
  int outputs;               // K
  int tiles;
};

// A thread's part of the scale and shift of a panel whose channels all exist: where its first entry
// comes from, for a panel of channel 0, and where it goes.
template <typename T, int kThreads>
struct ScaleShiftCopy {
  static constexpr int kEntries = 2 * device::kPanelChannels<T>;
  int from, to;  // in registers, see device::kept

  __device__ __forceinline__ ScaleShiftCopy(const device::Table& norm, int thread) {
    const int row = thread & 1, channel = thread >> 1;
    from = device::kept((kScale + row) * static_cast<int>(norm.stride) + channel);
    to = device::kept(device::scale_shift_offset(channel) + 4 * row);
  }

  __device__ __forceinline__ void copy(unsigned char* shared, const device::Table& norm,
                                       int channel, int thread) const {
    if (kEntries < kThreads && thread >= kEntries) return;
    const float* const first = norm.data + (from + channel);
    device::cp_async<4>(shared + to, first);
    // 16 channels further on the first two chunks' places are the last two's.
    if constexpr (kEntries > kThreads) device::cp_async<4>(shared + (to ^ 16) + 128, first + 16);
  }
};

// A chunk of a row that is aligned to kBytes: 16, 8 or 4. Of 8 every other 128 bytes of a panel
// copy the upper half first, or half the banks would idle. `place`: the chunk's in the panel.
template <int kBytes>
__device__ __forceinline__ void copy_aligned(unsigned char* shared, const unsigned char* from,
                                             int place) {
  const int flip = kBytes == 8 ? place >> 4 & 8 : 0;
#pragma unroll
  for (int byte = 0; byte < 16; byte += kBytes)
    device::cp_async<kBytes>(shared + (byte ^ flip), from + (byte ^ flip));
}

// Calls f(std::integral_constant<int, kBytes>) for rows of so many bytes' alignment.
template <typename T, typename F>
__device__ __forceinline__ void with_alignment(const device::RowTensor& rows, const F& f) {
  const int bytes = rows.vector * static_cast<int>(sizeof(T));
  if (bytes == 16)
    f(std::integral_constant<int, 16>{});
  else if (bytes == 8)
    f(std::integral_constant<int, 8>{});
  else
    f(std::integral_constant<int, 4>{});
}

// Where a lane finds its operands in a stage: those of the panel's first half of channels. The
// second half's are the same, exclusive or 32 (for the norm: those of kDepth channels later).
template <typename T>
struct OperandPlaces {
  int x, weight, channel;  // in registers, see device::kept

  __device__ __forceinline__ OperandPlaces(int x_rows, int weight_rows) {
    using namespace device;
    const int lane = lane_index();
    x = kept(x_rows + panel_offset<T>(a_row(lane), a_chunk(lane)));
    weight = kept(weight_rows + panel_offset<T>(b_row(lane), b_chunk(lane)));
    channel = kept(kOperandChannels<T> * (lane & 3));
  }
};

// Two 8-column tiles at a time: one depth of a warp tile of 16 * kRowTiles rows.
template <typename T, int kRowTiles, int kTiles>
__device__ __forceinline__ void multiply_step(float (&acc)[kRowTiles][kTiles][4],
                                              const unsigned char* stage, int norm_offset,
                                              const OperandPlaces<T>& places, int step) {
  using namespace device;
  const unsigned char* const norm = stage + norm_offset;
  const int channel = kDepth<T> * step + places.channel;
  const OperandNorm<T> norm_low = load_operand_norm<T>(norm, channel);
  const OperandNorm<T> norm_high = load_operand_norm<T>(norm, channel + kDepth<T> / 2);
  // Eight rows further on, the order of the chunks is the same.
  const unsigned char* const x = stage + (places.x ^ (32 * step));
  const unsigned char* const weight = stage + (places.weight ^ (32 * step));
  uint32_t a[kRowTiles][4];
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
    ldmatrix_x4(a[m], x + 16 * m * kPanelRowBytes);
    a[m][0] = norm_relu_operand<T>(a[m][0], norm_low);
    a[m][1] = norm_relu_operand<T>(a[m][1], norm_low);
    a[m][2] = norm_relu_operand<T>(a[m][2], norm_high);
    a[m][3] = norm_relu_operand<T>(a[m][3], norm_high);
  }
#pragma unroll
  for (int j = 0; j < kTiles; j += 2) {
    uint32_t b[4];
    ldmatrix_x4(b, weight + 8 * j * kPanelRowBytes);
    round_operands<T>(b);
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) multiply_add_pair<T>(acc[m][j], acc[m][j + 1], a[m], b);
  }
}

}  // namespace densenet_efficient::conv1x1_forward
