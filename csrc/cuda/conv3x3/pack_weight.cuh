// The 3x3 convolution's weight [K, C, 3, 3] as rows of channels, one for each output and tap:
// row 9 k + tap. A channels-last weight lies like that already; any other layout is copied first.
#pragma once

#include "../gemm/row_tensor.h"
#include "../tiling/conv3x3.h"
#include "../workspace.h"

namespace densenet_efficient {

template <typename T>
struct PackWeight {
  const T* weight;
  int64_t stride[4];  // of [K, C, 3, 3]
  T* packed;          // [9 K, pitch]
  int64_t pitch;
  int outputs, channels;
};

constexpr int kPackChannels = 32, kPackThreads = 96;
constexpr int kPackElements = kPackChannels * 9;

// A block transposes 32 channels of one output in shared memory, so that a contiguous weight is
// read, and the rows are written, in runs. Called by a kernel that bears its operator's name.
template <typename T>
__device__ __forceinline__ void pack_weight(const PackWeight<T>& args) {
  using namespace device;
  using Element = Bits<T>;
  unsigned char* shared = shared_memory();  // [32 channels, 9 taps]
  const int channel0 = block_x() * kPackChannels, output = block_y();
  const T* from = args.weight + output * args.stride[0];
  for (int i = thread_index(); i < kPackElements; i += kPackThreads) {
    const int channel = channel0 + i / 9, tap = i % 9;
    Element value = 0;
    if (channel < args.channels)
      value = global_load<Element>(from + channel * args.stride[1] + tap / 3 * args.stride[2] +
                                   tap % 3 * args.stride[3]);
    shared_store(shared + sizeof(T) * i, value);
  }
  sync_threads();
  for (int i = thread_index(); i < kPackElements; i += kPackThreads) {
    const int channel = i % kPackChannels, tap = i / kPackChannels;
    if (channel0 + channel < args.pitch)
      global_store(args.packed + (int64_t(output) * 9 + tap) * args.pitch + channel0 + channel,
                   shared_load<Element>(shared + sizeof(T) * (channel * 9 + tap)));
  }
}

// Whether a weight [K, C, 3, 3] must be copied: its channels are not neighbours.
inline bool needs_packing(const Tensor& weight) {
  const int64_t channels = weight.size(1);
  return weight.stride(1) != 1 || weight.stride(3) != channels ||
         weight.stride(2) != 3 * channels || weight.stride(0) != 9 * channels;
}

// The weight's rows: its own, or those of the copy, which the operator's kernel makes. The copy's
// memory is there (weight_copy_bytes) where one is needed and there is anything to compute.
template <auto kernel, typename T>
device::RowTensor packed_rows(const Launcher& launcher, const Tensor& weight,
                              const Workspace& copy) {
  const int64_t outputs = weight.size(0), channels = weight.size(1);
  if (!needs_packing(weight)) return row_tensor({&weight, channels});
  const int64_t pitch = round_up(channels, device::kChunk<T>);
  T* const packed = copy.data<T>();
  if (packed)
    launcher.launch<kernel>(
        {.grid_x = ceil_div(pitch, kPackChannels),
         .grid_y = outputs,
         .block = kPackThreads,
         .shared_bytes = kPackElements * static_cast<int64_t>(sizeof(T))},
        PackWeight<T>{static_cast<const T*>(weight.const_data_ptr()),
                      {weight.stride(0), weight.stride(1), weight.stride(2), weight.stride(3)},
                      packed,
                      pitch,
                      static_cast<int>(outputs),
                      static_cast<int>(channels)});
  return {packed, pitch, device::kChunk<T>};
}

}  // namespace densenet_efficient
