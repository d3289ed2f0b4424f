// How launchers hand tensors to the convolution kernels.
#pragma once

#include <optional>

#include "../launch.h"
#include "panel.cuh"

namespace densenet_efficient {

// The widest access, in elements, to which the tensor's first channel and all its rows are aligned,
// up to 16 bytes. A feature slice of growth rate 12 begins at multiples of 24 bytes: four elements.
inline device::RowTensor row_tensor(const Strided& rows) {
  if (!rows) return {};
  void* const data = const_cast<void*>(rows.tensor->const_data_ptr());
  const auto size = static_cast<uintptr_t>(rows.tensor->element_size());
  const uintptr_t alignment = reinterpret_cast<uintptr_t>(data) | size * rows.stride;
  int vector = 16 / static_cast<int>(size);
  while (alignment % (size * vector)) vector /= 2;
  return {data, rows.stride, vector};
}

// The same for a tensor that the kernel writes.
inline device::RowTensor output_row_tensor(const Strided& rows) {
  rows.tensor->mutable_data_ptr();  // a copy-on-write tensor gets memory of its own first
  return row_tensor(rows);
}

// A weight [K, C], which these kernels read by rows: a layout without is refused here.
template <typename Call>
device::RowTensor weight_rows(const Call& call) {
  return row_tensor({&call.weight, check_rows({call.lead.op, "weight", call.weight})});
}

inline device::Table float_table(const Strided& table) {
  const auto rows = input_rows<float>(table);
  return {rows.data, rows.stride};
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
