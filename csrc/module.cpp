// The compiled companion of the operator library: what it was built from, and the scratch that its
// operators take. It links neither torch nor CUDA and is compiled for any CPU of its kind, so that
// it can say why the library itself does not load.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <stdexcept>
#include <string>
#include <vector>

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

int64_t bytes(const workspace::Sizes& sizes, const std::string& op,
              const std::vector<int64_t>& shape, int64_t channels, int64_t size, int64_t threads) {
  if (shape.size() != 2 && shape.size() != 4)
    throw std::invalid_argument("shape must be [M, C] or [N, H, W, C], got " +
                                std::to_string(shape.size()) + " dimensions");
  const bool image = shape.size() == 4;
  const workspace::Call call{.N = shape[0],
                             .H = image ? shape[1] : 1,
                             .W = image ? shape[2] : 1,
                             .C = shape.back(),
                             .K = channels,
                             .size = size,
                             .threads = threads};
  const auto found = sizes.find(op);
  return found == sizes.end() || call.rows() == 0 ? 0 : found->second(call);
}

int64_t cpu_bytes(const std::string& op, const std::vector<int64_t>& shape, int64_t channels,
                  int64_t element_bytes, int64_t threads) {
  if (element_bytes != 4 && element_bytes != 8) refuse("element_bytes", "4 or 8", element_bytes);
  if (threads < 1) refuse("threads", "positive", threads);
  return bytes(workspace::cpu_sizes(), op, shape, channels, element_bytes, threads);
}

int64_t cuda_bytes(const std::string& op, const std::vector<int64_t>& shape, int64_t channels,
                   int64_t element_bytes, int64_t multiprocessors) {
  if (element_bytes != 2 && element_bytes != 4 && element_bytes != 8)
    refuse("element_bytes", "2, 4 or 8", element_bytes);
  if (multiprocessors < 1) refuse("multiprocessors", "positive", multiprocessors);
  return bytes(workspace::cuda_sizes(), op, shape, channels, element_bytes, multiprocessors);
}

}  // namespace
}  // namespace densenet_efficient

PYBIND11_MODULE(_module, module) {
  using namespace densenet_efficient;
  namespace py = pybind11;
  module.doc() = "Build information and workspace sizes of densenet_efficient.";
  module.attr("__version__") = kBuildInfo.at("version");
  module.def(
      "build_info", [] { return kBuildInfo; },
      "What the library was built from and for: a dict of texts, lists separated by spaces.");
  module.def("workspace_bytes", &cpu_bytes, py::arg("op"), py::arg("shape"),
             py::arg("channels") = 0, py::arg("element_bytes") = 4, py::arg("threads") = 1,
             "The most bytes of scratch that a CPU operator of csrc/ops.cpp holds at a time, for x "
             "of `shape` ([M, C] or [N, H, W, C]) and `channels` channels of y. element_bytes: 4, "
             "or 8 for float64. ValueError where an argument is out of range.");
  module.def("cuda_workspace_bytes", &cuda_bytes, py::arg("op"), py::arg("shape"),
             py::arg("channels") = 0, py::arg("element_bytes") = 2,
             py::arg("multiprocessors") = 132,
             "The same for a CUDA operator, for rows aligned to 16 bytes. element_bytes: of an "
             "activation, 2, 4 or 8. ValueError where an argument is out of range.");
}
