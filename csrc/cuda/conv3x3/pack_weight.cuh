// The 3x3 convolution's weight [K, C, 3, 3] as rows of channels, one for each output and tap:
// row 9 k + tap. A channels-last weight lies like that already; any other layout is copied first.
#pragma once

#include "../gemm/row_tensor.h"

namespace densenet_efficient {

template <typename T>
struct PackWeight {
  const T* weight;
  int64_t stride[4];  // of [K, C, 3, 3]
  T* packed;          // [9 K, pitch]
  int64_t pitch;
  int outputs, channels;
};

namespace weight3x3 {

constexpr int kChannels = 32;
constexpr int kElements = kChannels * 9;
constexpr int kThreads = 96;

// A block turns 32 channels of one output around in shared memory, so that a contiguous weight is
// read, and the rows are written, in runs.
template <typename T>
__global__ void __launch_bounds__(kThreads) pack_kernel(PackWeight<T> args) {
  using namespace device;
  using Element = Bits<T>;
  unsigned char* shared = shared_memory();  // [32 channels, 9 taps]
  const int channel0 = block_x() * kChannels, output = block_y();
  const T* from = args.weight + output * args.stride[0];
  for (int i = thread_index(); i < kElements; i += kThreads) {
    const int channel = channel0 + i / 9, tap = i % 9;
    Element value = 0;
    if (channel < args.channels)
      value = global_load<Element>(from + channel * args.stride[1] + tap / 3 * args.stride[2] +
                                   tap % 3 * args.stride[3]);
    shared_store(shared + sizeof(T) * i, value);
  }
  sync_threads();
  for (int i = thread_index(); i < kElements; i += kThreads) {
    const int channel = i % kChannels, tap = i / kChannels;
    if (channel0 + channel < args.pitch)
      global_store(args.packed + (int64_t(output) * 9 + tap) * args.pitch + channel0 + channel,
                   shared_load<Element>(shared + sizeof(T) * (channel * 9 + tap)));
  }
}

}  // namespace weight3x3

// Owns the copy where one is needed.
template <typename T>
class WeightRows {
 public:
  WeightRows(const Launcher& launcher, const Tensor& weight)
      : channels_last_(is_channels_last(weight)),
        copy_(weight, channels_last_ ? 0
                                     : workspace::cuda::conv3x3_weight_bytes(
                                           weight.size(0), weight.size(1), sizeof(T))) {
    const int64_t outputs = weight.size(0), channels = weight.size(1);
    if (channels_last_) {
      rows_ = row_tensor({&weight, channels});
      return;
    }
    const int64_t pitch = round_up(channels, device::kChunk<T>);
    rows_ = {copy_.data(), pitch, device::kChunk<T>};
    if (outputs * channels == 0) return;
    launcher.launch<&weight3x3::pack_kernel<T>>(
        {ceil_div(pitch, weight3x3::kChannels), outputs, weight3x3::kThreads,
         weight3x3::kElements * static_cast<int64_t>(sizeof(T))},
        PackWeight<T>{static_cast<const T*>(weight.const_data_ptr()),
                      {weight.stride(0), weight.stride(1), weight.stride(2), weight.stride(3)},
                      static_cast<T*>(rows_.data),
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
