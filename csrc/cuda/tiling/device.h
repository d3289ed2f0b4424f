// What decides about a tiling besides the shape.
#pragma once

#include <cstdint>

namespace densenet_efficient::tiling {

struct Device {
  int multiprocessors = 0;
  int64_t shared_bytes = 0;  // the most that one block may ask for

  // Blocks that the shared memory of a multiprocessor holds. The system takes a kilobyte of each,
  // and one block may ask for all that is left.
  constexpr int blocks_by_shared(int64_t bytes) const {
    return static_cast<int>((shared_bytes + 1024) / (bytes + 1024));
  }
};

}  // namespace densenet_efficient::tiling
