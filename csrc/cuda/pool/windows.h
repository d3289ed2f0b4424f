// The 2 x 2 windows that a transition pools: a pooled row and its pixels in x.
#pragma once

#include <cstdint>
#include <limits>

#include "../launch.h"

namespace densenet_efficient {

constexpr int kWindowPixels = 4;

// Windows of an image, row by row; `whole` counts those with four pixels only (odd edges are
// dropped), otherwise windows that an odd edge cuts count as well.
struct PoolWindows {
  int height, width;          // of the image
  int out_height, out_width;  // in windows
  int windows;                // of all images

  PoolWindows(const arguments::ImageArguments& call, bool whole)
      : height(static_cast<int>(call.H)),
        width(static_cast<int>(call.W)),
        out_height(whole ? height / 2 : (height + 1) / 2),
        out_width(whole ? width / 2 : (width + 1) / 2) {
    const int64_t pixels = call.N * call.H * call.W;
    if (pixels > std::numeric_limits<int>::max())
      fail(call.lead, "must have fewer than 2^31 pixels, got ", pixels);
    windows = static_cast<int>(call.N) * out_height * out_width;
  }

  // The window's upper left pixel, as a row of [N * H * W, C].
  DE_HOST_DEVICE int corner(int window) const {
    const int row = window / out_width, column = window - row * out_width;
    const int image = row / out_height, image_row = row - image * out_height;
    return (image * height + 2 * image_row) * width + 2 * column;
  }
  // From there to pixel 0..3 of the window.
  DE_HOST_DEVICE int offset(int pixel) const { return (pixel >> 1) * width + (pixel & 1); }
};

}  // namespace densenet_efficient
