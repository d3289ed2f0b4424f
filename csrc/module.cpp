// The compiled companion of the operator library: what it was built from, and the scratch that its
// stages take. It links neither torch nor CUDA and is compiled for any CPU of its kind, so that it
// can say why the library itself does not load.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

namespace {

// Keys are listed in build_backend/native.py; every value is text, lists are separated by spaces.
const std::map<std::string, std::string> kBuildInfo = {
#include "build_info.h"
};

}  // namespace

PYBIND11_MODULE(_module, module) {
  module.doc() = "Build information and workspace sizes of densenet_efficient.";
  module.attr("__version__") = kBuildInfo.at("version");
  module.def(
      "build_info", [] { return kBuildInfo; },
      "What the library was built from and for: a dict of texts, lists separated by spaces.");
}
