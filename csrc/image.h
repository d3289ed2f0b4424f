// Images of one, two or three dimensions.
#pragma once

#include <cstdint>

namespace densenet_efficient {

// The extent of a window of pixels: of a convolution's kernel, of a pooling.
struct Window {
  int64_t depth, height, width;
  constexpr int64_t size() const { return depth * height * width; }
};

// The pixels of N images. Two dimensions are planes of depth 1; one dimension counts as height.
struct Image {
  int64_t dims, N, D, H, W;

  constexpr int64_t pixels() const { return N * D * H * W; }

  // `n` pixels along each of the image's dimensions.
  constexpr Window window(int64_t n) const { return {dims > 2 ? n : 1, n, dims > 1 ? n : 1}; }

  // What is left where every window of two by two pixels becomes one and odd edges are dropped.
  constexpr Image halved() const {
    return {dims, N, dims > 2 ? D / 2 : D, H / 2, dims > 1 ? W / 2 : W};
  }
  // The same, odd edges kept.
  constexpr Image halved_up() const { return {dims, N, (D + 1) / 2, (H + 1) / 2, (W + 1) / 2}; }
};

}  // namespace densenet_efficient
