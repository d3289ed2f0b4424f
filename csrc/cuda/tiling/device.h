// What decides about a tiling besides the shape.
#pragma once

#include <cstdint>

namespace densenet_efficient::tiling {

struct Device {
  int multiprocessors = 0;
  int64_t shared_bytes = 0;  // the most that one block may ask for
};

}  // namespace densenet_efficient::tiling
