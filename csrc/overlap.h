// Whether two arguments share elements of memory. What a kernel writes must share none with
// anything else it is given: rows are read again after others have been written, in the order of
// the threads. Channel slices of one buffer lie between each other without sharing any.
#pragma once

#include <cstdint>

#include "checks.h"
#include "views.h"

namespace densenet_efficient {

// The bytes of a tensor's rows.
struct Extent {
  const char* name = nullptr;
  uintptr_t begin = 0, end = 0, stride = 0, width = 0;
  bool one_row = false;

  Extent() = default;
  Extent(const Strided& rows, const void* data)
      : name(rows.name),
        begin(reinterpret_cast<uintptr_t>(data)),
        end(begin),
        one_row(rows.rows == 1) {
    const uintptr_t bytes = rows.tensor->element_size();
    stride = static_cast<uintptr_t>(rows.stride) * bytes;
    width = static_cast<uintptr_t>(rows.channels) * bytes;
    if (rows.rows > 0) end += static_cast<uintptr_t>(rows.rows - 1) * stride + width;
  }
};

// Exact for rows of the same stride; two tensors of different strides that lie between each other
// count as overlapping.
inline bool overlap(const Extent& a, const Extent& b) {
  if (a.begin == a.end || b.begin == b.end || a.end <= b.begin || b.end <= a.begin) return false;
  if (a.one_row ? b.one_row : !b.one_row && a.stride != b.stride) return true;
  const uintptr_t stride = a.one_row ? b.stride : a.stride;
  // where b's rows begin within a's
  const uintptr_t offset = b.begin >= a.begin ? (b.begin - a.begin) % stride
                                              : (stride - (a.begin - b.begin) % stride) % stride;
  return offset < a.width || offset + b.width > stride;
}

// Fails where a tensor in `written` shares memory with another one there or in `read`. Those that
// are not given are passed over.
inline void check_apart(const char* op, std::initializer_list<Strided> written,
                        std::initializer_list<Strided> read) {
  constexpr int kMost = 12;
  Extent extents[kMost];
  const Tensor* outputs[kMost];
  int outputs_given = 0, given = 0;
  // The outputs first: a copy-on-write tensor gets memory of its own when it is asked for.
  for (const Strided& rows : written) {
    if (!rows) continue;
    outputs[outputs_given++] = rows.tensor;
    extents[given++] = Extent(rows, rows.tensor->mutable_data_ptr());
  }
  for (const Strided& rows : read)
    if (rows) extents[given++] = Extent(rows, rows.tensor->const_data_ptr());
  for (int i = 0; i < outputs_given; ++i)
    for (int j = i + 1; j < given; ++j)
      if (overlap(extents[i], extents[j]))
        fail({op, extents[i].name, *outputs[i]}, "is written and must not share memory with ",
             extents[j].name);
}

}  // namespace densenet_efficient
