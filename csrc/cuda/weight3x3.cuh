// The 3x3 convolution's weight [K, C, 3, 3] as rows of channels, one for each output and tap:
// row 9 k + tap. A channels-last weight lies like that already; any other layout is copied first.
#pragma once

#include "operands.h"

namespace densenet_efficient {

struct PackWeight {
  const uint16_t* weight;
  int64_t stride[4];  // of [K, C, 3, 3]
  uint16_t* packed;   // [9 K, pitch]
  int64_t pitch;
  int outputs, channels;
};

namespace weight3x3 {

constexpr int kThreads = 256;

template <int = 0>
__global__ void __launch_bounds__(kThreads) pack_kernel(PackWeight args) {
  using namespace device;
  const int64_t index = int64_t(block_x()) * kThreads + thread_index();
  const int64_t row = index / args.pitch;
  const int channel = static_cast<int>(index % args.pitch);
  if (row >= int64_t(args.outputs) * 9) return;
  const int64_t output = row / 9, tap = row % 9;
  uint16_t value = 0;
  if (channel < args.channels)
    value = global_load<uint16_t>(args.weight + output * args.stride[0] + channel * args.stride[1] +
                                  tap / 3 * args.stride[2] + tap % 3 * args.stride[3]);
  global_store(args.packed + index, value);
}

}  // namespace weight3x3

// Owns the copy where one is needed.
class WeightRows {
 public:
  WeightRows(const Launcher& launcher, const Tensor& weight)
      : channels_last_(is_channels_last(weight)),
        copy_(weight, channels_last_
                          ? 0
                          : workspace::cuda::conv3x3_weight_bytes(weight.size(0), weight.size(1))) {
    const int64_t outputs = weight.size(0), channels = weight.size(1);
    if (channels_last_) {
      rows_ = row_tensor(weight, channels);
      return;
    }
    const int64_t pitch = round_up(channels, device::kChunk);
    rows_ = {copy_.data(), pitch, device::kChunk};
    const int64_t elements = outputs * 9 * pitch;
    if (elements == 0) return;
    launcher.launch<&weight3x3::pack_kernel<>>(
        {ceil_div(elements, weight3x3::kThreads), 1, weight3x3::kThreads, 0},
        PackWeight{static_cast<const uint16_t*>(weight.const_data_ptr()),
                   {weight.stride(0), weight.stride(1), weight.stride(2), weight.stride(3)},
                   static_cast<uint16_t*>(rows_.data),
                   pitch,
                   static_cast<int>(outputs),
                   static_cast<int>(channels)});
  }
  const device::RowTensor& rows() const { return rows_; }

 private:
  static bool is_channels_last(const Tensor& weight) {
    const int64_t channels = weight.size(1);
    return weight.stride(1) == 1 && weight.stride(3) == channels &&
           weight.stride(2) == 3 * channels && weight.stride(0) == 9 * channels;
  }

  bool channels_last_;
  Workspace copy_;
  device::RowTensor rows_;
};

}  // namespace densenet_efficient
