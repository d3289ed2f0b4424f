// How launchers hand tensors to kernels: rows and their stride, and the C++ type of a dtype.
#pragma once

#include "norm_relu.h"
#include "stable.h"

namespace densenet_efficient {

// Rows of a channels-last tensor or of a table of per-channel vectors.
template <typename T>
struct Rows {
  T* data;
  int64_t stride;
  DE_HOST_DEVICE T* operator[](int64_t row) const { return data + row * stride; }
};

// The rows of a tensor: `channels` elements each, `stride` elements from one to the next. Null: not
// given.
struct Strided {
  const Tensor* tensor = nullptr;
  int64_t stride = 0, rows = 0, channels = 0;
  const char* name = nullptr;

  explicit operator bool() const { return tensor; }
};

// The gradient of a convolution's weight [K, C, *kernel], contiguous or channels last: K rows of
// its elements, and how far channels and taps are from each other in them. Null: not given.
struct StridedWeight : Strided {
  int64_t channel = 1, tap = 1;
};

template <typename T>
Rows<const T> input_rows(const Strided& from) {
  return {from ? static_cast<const T*>(from.tensor->const_data_ptr()) : nullptr, from.stride};
}

template <typename T>
Rows<T> output_rows(const Strided& to) {
  return {to ? static_cast<T*>(to.tensor->mutable_data_ptr()) : nullptr, to.stride};
}

// Calls f with a value whose type stands for an activation's dtype (checked before): f(BFloat16{})
// and so on.
template <typename F>
void dispatch_activation(ScalarType dtype, F&& f) {
  switch (dtype) {
    case ScalarType::BFloat16: return f(BFloat16{});
    case ScalarType::Half: return f(Half{});
    case ScalarType::Double: return f(double{});
    default: return f(float{});
  }
}

// The same for the dtype of tables: float32 or float64.
template <typename F>
void dispatch_arithmetic(ScalarType dtype, F&& f) {
  return dtype == ScalarType::Double ? f(double{}) : f(float{});
}

}  // namespace densenet_efficient
