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
  return {const_cast<void*>(rows.tensor->const_data_ptr()), rows.stride,
          static_cast<int>(row_alignment({rows}) / rows.tensor->element_size())};
}

// The same for a tensor that the kernel writes.
inline device::RowTensor output_row_tensor(const Strided& rows) {
  rows.tensor->mutable_data_ptr();  // a copy-on-write tensor gets memory of its own first
  return row_tensor(rows);
}

// A weight [K, C], which these kernels read by rows: a layout without is refused here.
template <typename Call>
device::RowTensor weight_rows(const Call& call) {
  return row_tensor(check_rows({call.lead.op, "weight", call.weight}));
}

inline device::Table float_table(const Strided& table) {
  const auto rows = input_rows<float>(table);
  return {rows.data, rows.stride};
}

}  // namespace densenet_efficient
