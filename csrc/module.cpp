// The compiled companion of the operator library: what it was built from, the scratch that its
// operators take, and the comparison of modules with what they were. It links neither torch nor
// CUDA and is compiled for any CPU of its kind, so that it can say why the library itself does not
// load.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "snapshot.h"
#include "workspaces.h"

namespace densenet_efficient {
namespace {

// Keys are listed in build_backend/native.py; every value is text, lists are separated by spaces.
const std::map<std::string, std::string> kBuildInfo = {
#include "build_info.h"
};

[[noreturn]] void refuse(const char* name, const char* expected, int64_t got) {
  throw std::invalid_argument(std::string(name) + " must be " + expected + ", got " +
                              std::to_string(got));
}

CallShape call_shape(const std::vector<int64_t>& shape, int64_t channels) {
  const int64_t dims = static_cast<int64_t>(shape.size()) - 2;
  if (dims < 0 || dims > 3)
    throw std::invalid_argument("shape must be [M, C] or [N, *spatial, C], got " +
                                std::to_string(shape.size()) + " dimensions");
  const int64_t height = dims > 2 ? 2 : 1;
  return {.x = {.dims = dims > 0 ? dims : 2,
                .N = shape[0],
                .D = dims > 2 ? shape[1] : 1,
                .H = dims > 0 ? shape[height] : 1,
                .W = dims > 1 ? shape[height + 1] : 1},
          .C = shape.back(),
          .K = channels};
}

template <typename Call>
int64_t bytes(const WorkspaceSizes<Call>& sizes, const std::string& op, const Call& call) {
  const auto found = sizes.find(op);
  return found == sizes.end() || call.rows() == 0 ? 0 : found->second(call);
}

int64_t cpu_bytes(const std::string& op, const std::vector<int64_t>& shape, int64_t channels,
                  int64_t element_bytes, int64_t threads) {
  if (element_bytes != 4 && element_bytes != 8) refuse("element_bytes", "4 or 8", element_bytes);
  if (threads < 1) refuse("threads", "positive", threads);
  return bytes<CpuCall>(cpu_workspaces(), op,
                        {call_shape(shape, channels), element_bytes, threads});
}

int64_t cuda_bytes(const std::string& op, const std::vector<int64_t>& shape, int64_t channels,
                   int64_t element_bytes, int multiprocessors, int64_t shared_bytes,
                   int64_t row_alignment, bool packed_weight, bool accumulate,
                   bool optional_output) {
  if (element_bytes != 2 && element_bytes != 4 && element_bytes != 8)
    refuse("element_bytes", "2, 4 or 8", element_bytes);
  if (multiprocessors < 1) refuse("multiprocessors", "positive", multiprocessors);
  if (shared_bytes < 1) refuse("shared_bytes", "positive", shared_bytes);
  if (row_alignment < 1) refuse("row_alignment", "positive", row_alignment);
  return bytes<CudaCall>(
      cuda_workspaces(), op,
      {call_shape(shape, channels), element_bytes, tiling::Device{multiprocessors, shared_bytes},
       row_alignment, packed_weight, accumulate, optional_output});
}

}  // namespace
}  // namespace densenet_efficient

PYBIND11_MODULE(_module, module) {
  using namespace densenet_efficient;
  namespace py = pybind11;
  module.doc() = "Build information, workspace sizes and comparisons of densenet_efficient.";
  module.attr("__version__") = kBuildInfo.at("version");
  module.def(
      "build_info", [] { return kBuildInfo; },
      "What the library was built from and for: a dict of texts, lists separated by spaces.");
  module.def(
      "workspace_bytes", &cpu_bytes, py::arg("op"), py::arg("shape"), py::arg("channels") = 0,
      py::arg("element_bytes") = 4, py::arg("threads") = 1,
      "The most bytes of scratch that a CPU operator of csrc/ops.cpp holds at a time, for x "
      "of `shape` ([M, C] or [N, *spatial, C]) and `channels` channels of y. element_bytes: 4, "
      "or 8 for float64. ValueError where an argument is out of range.");
  module.def("cuda_workspace_bytes", &cuda_bytes, py::arg("op"), py::arg("shape"),
             py::arg("channels") = 0, py::arg("element_bytes") = 2,
             py::arg("multiprocessors") = 132, py::arg("shared_bytes") = 227 << 10,
             py::arg("row_alignment") = 16, py::arg("packed_weight") = false,
             py::arg("accumulate") = false, py::arg("optional_output") = true,
             "The same for a CUDA operator. element_bytes: of an activation, 2, 4 or 8. "
             "multiprocessors and shared_bytes (the most one block may ask for): of the device. "
             "row_alignment: bytes to which all rows of the activations are aligned. "
             "packed_weight: the channels of a 3x3 weight are neighbours. accumulate: as in "
             "norm_relu_conv3x3_backward. optional_output: stats or dweight is wanted. ValueError "
             "where an argument is out of range.");
  module.def(
      "tensors_if_unchanged",
      [](const py::tuple& entries, const py::tuple& kinds) {
        PyObject* found = Snapshot(entries.ptr(), kinds.ptr()).tensors();
        if (!found) throw py::error_already_set();
        return py::reinterpret_steal<py::object>(found);
      },
      py::arg("entries"), py::arg("kinds"),
      "The tensors of some modules, in order, if all is as csrc/snapshot.h describes it in "
      "`entries`, and each tensor of one of the `kinds`; None otherwise.");
}
