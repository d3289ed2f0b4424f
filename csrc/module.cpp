// The compiled companion of the operator library: what it was built from, and the scratch that its
// operators take. It links neither torch nor CUDA and is compiled for any CPU of its kind, so that
// it can say why the library itself does not load.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "workspace.h"

namespace densenet_efficient {
namespace {

// Keys are listed in build_backend/native.py; every value is text, lists are separated by spaces.
const std::map<std::string, std::string> kBuildInfo = {
#include "build_info.h"
};

// A call as the workspace functions see it. A row tensor [M, C] is N = M images of one pixel.
struct Call {
  int64_t N, H, W, C;  // x
  int64_t K;           // channels of y, 0 where y is no product
  int64_t size;        // bytes of an arithmetic element: 4, or 8 for float64
  int64_t threads;

  int64_t rows() const { return N * H * W; }
  int64_t pooled_rows() const { return N * (H / 2) * (W / 2); }
};

namespace cpu = workspace::cpu;

// The most that a CPU operator holds at a time; operators without an entry allocate nothing.
const std::map<std::string, std::function<int64_t(const Call&)>> kCpuBytes = {
    {"channel_stats",
     [](const Call& c) { return cpu::ChannelStats(c.rows(), c.C, c.size, c.threads).bytes; }},
    {"norm_relu_conv1x1_forward",
     [](const Call& c) {
       return cpu::ProductForward(c.rows(), c.C, c.K, c.size, c.threads).bytes;
     }},
    {"norm_relu_conv1x1_backward",
     [](const Call& c) {
       return cpu::ProductBackward(c.rows(), c.C, c.K, c.size, c.threads).bytes;
     }},
    {"norm_relu_conv3x3_forward",
     [](const Call& c) {
       return cpu::Conv3x3Forward(c.N, c.H, c.W, c.C, c.K, c.size, c.threads).bytes;
     }},
    {"norm_relu_conv3x3_backward",
     [](const Call& c) {
       return cpu::Conv3x3Backward(c.N, c.H, c.W, c.C, c.K, c.size, c.threads).bytes;
     }},
    {"transition_forward",
     [](const Call& c) {
       return cpu::ProductForward(c.pooled_rows(), c.C, c.K, c.size, c.threads).bytes;
     }},
    {"transition_backward",
     [](const Call& c) {  // one after the other
       return std::max(cpu::ProductBackward(c.pooled_rows(), c.C, c.K, c.size, c.threads).bytes,
                       cpu::transition_correction_bytes(c.C, c.size));
     }},
    {"stem_forward",
     [](const Call& c) { return cpu::Stem(c.N, c.H, c.W, c.C, c.size, c.threads).bytes; }},
    {"stem_backward",
     [](const Call& c) { return cpu::Stem(c.N, c.H, c.W, c.C, c.size, c.threads).bytes; }},
};

int64_t workspace_bytes(const std::string& op, const std::vector<int64_t>& shape, int64_t channels,
                        int64_t element_bytes, int64_t threads) {
  if (shape.size() != 2 && shape.size() != 4)
    throw std::invalid_argument("shape must be [M, C] or [N, H, W, C], got " +
                                std::to_string(shape.size()) + " dimensions");
  if (element_bytes != 4 && element_bytes != 8)
    throw std::invalid_argument("element_bytes must be 4 or 8, got " +
                                std::to_string(element_bytes));
  if (threads < 1)
    throw std::invalid_argument("threads must be positive, got " + std::to_string(threads));
  const bool image = shape.size() == 4;
  const Call call{.N = shape[0],
                  .H = image ? shape[1] : 1,
                  .W = image ? shape[2] : 1,
                  .C = shape.back(),
                  .K = channels,
                  .size = element_bytes,
                  .threads = threads};
  const auto found = kCpuBytes.find(op);
  return found == kCpuBytes.end() || call.rows() == 0 ? 0 : found->second(call);
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
  module.def(
      "workspace_bytes", &workspace_bytes, py::arg("op"), py::arg("shape"), py::arg("channels") = 0,
      py::arg("element_bytes") = 4, py::arg("threads") = 1,
      "The most bytes of scratch that a CPU operator of csrc/ops.cpp holds at a time, for x "
      "of `shape` ([M, C] or [N, H, W, C]) and `channels` channels of y. element_bytes: 4, or "
      "8 for float64. ValueError where an argument is out of range.");
}
