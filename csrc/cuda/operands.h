// How launchers hand tensors to the convolution kernels.
#pragma once

#include <optional>

#include "launch.h"
#include "tile.cuh"

namespace densenet_efficient {

// The widest access, in 16-bit elements, to which the tensor's first channel and all its rows are
// aligned. A feature slice of growth rate 12 begins at multiples of 24 bytes: 4 elements.
inline device::RowTensor row_tensor(const Tensor& tensor, int64_t stride) {
  const uintptr_t alignment =
      reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) | static_cast<uintptr_t>(2 * stride);
  int vector = device::kChunk;
  while (alignment % (2 * vector)) vector /= 2;
  return {const_cast<void*>(tensor.const_data_ptr()), stride, vector};
}

inline device::Table float_table(const Tensor& tensor, int64_t stride) {
  return {static_cast<const float*>(tensor.const_data_ptr()), stride};
}

// fp32 scratch from torch's allocator; null where none is needed.
class Workspace {
 public:
  Workspace() = default;
  Workspace(const Tensor& like, int64_t bytes) {
    if (bytes > 0) tensor_ = torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
  }
  float* data() const {
    return tensor_ ? static_cast<float*>(tensor_->mutable_data_ptr()) : nullptr;
  }

 private:
  OptionalTensor tensor_;
};

}  // namespace densenet_efficient
