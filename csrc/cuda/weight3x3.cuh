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

constexpr int kChannels = 32;
constexpr int kElements = kChannels * 9;
constexpr int kThreads = 96;

// A block turns 32 channels of one output around in shared memory, so that a contiguous weight is
// read, and the rows are written, in runs.
template <int = 0>
__global__ void __launch_bounds__(kThreads) pack_kernel(PackWeight args) {
  using namespace device;
  unsigned char* shared = shared_memory();  // [32 channels, 9 taps]
  const int channel0 = block_x() * kChannels, output = block_y();
  const uint16_t* from = args.weight + output * args.stride[0];
  for (int i = thread_index(); i < kElements; i += kThreads) {
    const int channel = channel0 + i / 9, tap = i % 9;
    uint16_t value = 0;
    if (channel < args.channels)
      value = global_load<uint16_t>(from + channel * args.stride[1] + tap / 3 * args.stride[2] +
                                    tap % 3 * args.stride[3]);
    shared_store(shared + 2 * i, value);
  }
  sync_threads();
  for (int i = thread_index(); i < kElements; i += kThreads) {
    const int channel = i % kChannels, tap = i / kChannels;
    if (channel0 + channel < args.pitch)
      global_store(args.packed + (int64_t(output) * 9 + tap) * args.pitch + channel0 + channel,
                   shared_load<uint16_t>(shared + 2 * (channel * 9 + tap)));
  }
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
      rows_ = row_tensor({&weight, channels});
      return;
    }
    const int64_t pitch = round_up(channels, device::kChunk);
    rows_ = {copy_.data(), pitch, device::kChunk};
    if (outputs * channels == 0) return;
    launcher.launch<&weight3x3::pack_kernel<>>(
        {ceil_div(pitch, weight3x3::kChannels), outputs, weight3x3::kThreads,
         2 * weight3x3::kElements},
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
