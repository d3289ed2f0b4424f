// Single checks of arguments. A message names the operator and the tensor, what was expected and
// what came; nothing is written before every check has passed (arguments.h).
#pragma once

#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>

#include "stable.h"
#include "views.h"

namespace densenet_efficient {

// A tensor argument and its name, for messages.
struct Arg {
  const char* op;
  const char* name;
  const Tensor& tensor;
};

inline std::string shape_text(const Tensor& tensor) {
  std::ostringstream text;
  text << "[";
  for (int64_t d = 0; d < tensor.dim(); ++d) text << (d ? ", " : "") << tensor.size(d);
  text << "]";
  return text.str();
}

inline const char* dtype_text(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double: return "float64";
    case ScalarType::Float: return "float32";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    case ScalarType::ComplexFloat: return "complex64";
    default: return "another dtype";
  }
}

inline std::string device_text(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  return (tensor.is_cuda() ? "cuda:" : "another device, ") + std::to_string(tensor.get_device());
}

template <typename... Parts>
[[noreturn]] void fail(const Arg& arg, const Parts&... parts) {
  std::ostringstream text;
  text << "densenet_efficient::" << arg.op << ": " << arg.name << " ";
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

// The shape that a tensor must have.
struct Shape {
  int64_t sizes[5], dim = 0;

  Shape(std::initializer_list<int64_t> list) {
    for (const int64_t size : list) add(size);
  }
  void add(int64_t size) { sizes[dim++] = size; }
};

// None arrives as an undefined tensor, whose shape [0] no argument has.
inline void check_given(const Arg& arg) {
  if (!arg.tensor.defined()) fail(arg, "must be a tensor, got None");
}

inline void check_shape(const Arg& arg, const Shape& expected) {
  const auto sizes = arg.tensor.sizes();
  bool same = static_cast<int64_t>(sizes.size()) == expected.dim;
  for (int64_t d = 0; same && d < expected.dim; ++d) same = sizes[d] == expected.sizes[d];
  if (same) return;
  check_given(arg);
  std::ostringstream text;
  for (int64_t d = 0; d < expected.dim; ++d) text << (d ? ", " : "") << expected.sizes[d];
  fail(arg, "must have shape [", text.str(), "], got ", shape_text(arg.tensor));
}

inline void check_dim(const Arg& arg, int64_t dim) {
  if (arg.tensor.dim() == dim) return;
  check_given(arg);
  fail(arg, "must have ", dim, " dimensions, got shape ", shape_text(arg.tensor));
}

inline void check_dtype(const Arg& arg, ScalarType expected) {
  if (arg.tensor.scalar_type() != expected)
    fail(arg, "must be ", dtype_text(expected), ", got ", dtype_text(arg.tensor.scalar_type()));
}

inline void check_activation_dtype(const Arg& arg) {
  switch (arg.tensor.scalar_type()) {
    case ScalarType::Double:
    case ScalarType::Float:
    case ScalarType::BFloat16:
    case ScalarType::Half: return;
    default:
      fail(arg, "must be float64, float32, bfloat16 or float16, got ",
           dtype_text(arg.tensor.scalar_type()));
  }
}

// Where a tensor is: asked once for the leading tensor.
struct Place {
  bool cpu;
  int index;

  explicit Place(const Tensor& tensor) : cpu(tensor.is_cpu()), index(tensor.get_device()) {}
  bool operator==(const Place&) const = default;
};

inline void check_device(const Arg& arg, const Arg& like, const Place& place) {
  if (!(Place(arg.tensor) == place))
    fail(arg, "must be on ", device_text(like.tensor), " as ", like.name, ", got ",
         device_text(arg.tensor));
}

inline void check_contiguous(const Arg& arg) {
  if (!arg.tensor.is_contiguous()) fail(arg, "must be contiguous");
}

// Whether [K, C, *kernel] lies in memory as [K, *kernel, C].
inline bool is_channels_last(const Tensor& tensor) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  const int64_t dims = static_cast<int64_t>(sizes.size());
  int64_t expected = 1;
  const auto fits = [&](int64_t d) {
    const bool same = sizes[d] == 1 || strides[d] == expected;
    expected *= sizes[d];
    return same;
  };
  bool all = fits(1);
  for (int64_t d = dims - 1; d > 1; --d) all = fits(d) && all;
  return fits(0) && all;
}

// The weight gradient's rows; fails where it is neither contiguous nor channels last.
inline StridedWeight check_weight_gradient(const Arg& arg) {
  const auto sizes = arg.tensor.sizes();
  const int64_t outputs = sizes[0], channels = sizes[1];
  int64_t taps = 1;
  for (size_t d = 2; d < sizes.size(); ++d) taps *= sizes[d];
  const bool contiguous = arg.tensor.is_contiguous();
  if (!contiguous && !is_channels_last(arg.tensor))
    fail(arg, "must be contiguous or channels last");
  const Strided rows{&arg.tensor, channels * taps, outputs, channels * taps, arg.name};
  return {rows, contiguous ? taps : 1, contiguous ? 1 : channels};
}

// The rows of a channels-last tensor of any rank; fails where they are not evenly spaced or the
// channels are not neighbours.
inline Strided check_rows(const Arg& arg) {
  const auto sizes = arg.tensor.sizes(), strides = arg.tensor.strides();
  const int64_t last = static_cast<int64_t>(sizes.size()) - 1;
  const int64_t channels = sizes[last];
  if (channels > 1 && strides[last] != 1)
    fail(arg, "must be channels last: stride of the last dimension 1, got ", strides[last]);
  int64_t row_stride = channels, rows = 1;
  bool found = false;
  for (int64_t d = last - 1; d >= 0; --d) {
    if (sizes[d] == 0) return {&arg.tensor, channels, 0, channels, arg.name};
    if (sizes[d] > 1) {
      if (!found) {
        row_stride = strides[d] / rows;
        found = true;
      }
      if (strides[d] != row_stride * rows || row_stride < channels)
        fail(arg, "must have evenly spaced rows of at least ", channels,
             " elements; stride of dimension ", d, " is ", strides[d]);
    }
    rows *= sizes[d];
  }
  return {&arg.tensor, row_stride, rows, channels, arg.name};
}

}  // namespace densenet_efficient
