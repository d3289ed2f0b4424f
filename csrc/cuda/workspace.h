// Scratch of one call, from torch's allocator: exactly as many bytes as the operator's tiling says.
// The emulation counts what is live.
#pragma once

#include "launch.h"

namespace densenet_efficient {

class Workspace {
 public:
  // Null where no bytes are needed.
  Workspace(const Tensor& like, int64_t bytes) {
    if (bytes == 0) return;
    tensor_ = torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
#if defined(DE_EMULATE)
    counted_.emplace(tensor_->const_data_ptr(), bytes);
#endif
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  template <typename A>
  A* data() const {
    return tensor_ ? static_cast<A*>(tensor_->mutable_data_ptr()) : nullptr;
  }

 private:
  OptionalTensor tensor_;
#if defined(DE_EMULATE)
  std::optional<emulation::CountedWorkspace> counted_;
#endif
};

}  // namespace densenet_efficient
