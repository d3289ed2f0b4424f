// The operand of a 3x3 convolution: a band of image rows, normalised, with a halo of one pixel.
#pragma once

#include <algorithm>

#include "operands.h"

namespace densenet_efficient::cpu {

// A band's rows of a halo: for each row and one on either side, the planes under the kernel.
template <typename Visit>
void halo_rows(const Window& kernel, int64_t plane, int64_t first, int64_t rows,
               const Visit& visit) {
  for (int64_t r = 0; r < rows + kernel.height - 1; ++r)
    for (int64_t d = 0; d < kernel.depth; ++d)
      visit(r * kernel.depth + d, plane + d - kernel.depth / 2, first + r - kernel.height / 2);
}

// x [N, D, H, W, C] and its norm.
template <typename T>
struct Source {
  Rows<const T> x;
  Rows<const Arithmetic<T>> norm;
  Image of;
  int64_t C;

  Window kernel() const { return of.window(3); }
  // Zero pixels at either end of a row of the halo.
  int64_t margin() const { return kernel().width / 2; }

  bool inside(int64_t plane, int64_t row) const {
    return plane >= 0 && plane < of.D && row >= 0 && row < of.H;
  }
  // The first pixel of an image row.
  int64_t pixel(int64_t image, int64_t plane, int64_t row) const {
    return ((image * of.D + plane) * of.H + row) * of.W;
  }

  // One image row, normalised and rectified, between its margins, padded to `width` elements; all
  // zero outside the image.
  void halo_row(int64_t image, int64_t plane, int64_t row, int64_t width, Element<T>* out) const {
    const int64_t W = of.W;
    if (!inside(plane, row))
      return void(std::fill_n(out, (W + 2 * margin()) * width, Element<T>(0)));
    Element<T>* first = out + margin() * width;
    std::fill(out, first, Element<T>(0));
    std::fill_n(first + W * width, margin() * width, Element<T>(0));
    const int64_t at = pixel(image, plane, row);
    for (int64_t w = 0; w < W; ++w) norm_relu_row<T>(x[at + w], norm, C, width, first + w * width);
  }

  // The same as units of a reduction over pixels, `columns` channels from `column` on: `low` and,
  // where a unit holds two, `high` are the image rows side by side.
  void halo_row_units(int64_t image, int64_t plane, int64_t low, int64_t high, int64_t column,
                      int64_t columns, int64_t width, Unit<T>* out) const {
    const int64_t rows[2] = {low, high}, W = of.W;
    Unit<T>* first = out + margin() * width;
    std::fill(out, first, Unit<T>(0));
    std::fill_n(first + W * width, margin() * width, Unit<T>(0));
    for (int64_t w = 0; w < W; ++w) {
      const T* pixels[kGroup<T>];
      for (int64_t i = 0; i < kGroup<T>; ++i)
        pixels[i] = inside(plane, rows[i]) ? x[pixel(image, plane, rows[i]) + w] + column : nullptr;
      norm_relu_units<T>(pixels, norm, column, columns, width, first + w * width);
    }
  }
};

// Taps in the order of the halo: rows of the kernel, in each its planes, in each its columns.
struct Taps {
  Window kernel;
  int64_t count = kernel.size();

  int64_t row(int64_t tap) const { return tap / (kernel.depth * kernel.width); }
  int64_t plane(int64_t tap) const { return tap / kernel.width % kernel.depth; }
  int64_t column(int64_t tap) const { return tap % kernel.width; }
  // Where a weight [K, C, *kernel] has a tap, whose last strides are these.
  int64_t offset(int64_t tap, int64_t depth, int64_t height, int64_t width) const {
    return plane(tap) * depth + row(tap) * height + column(tap) * width;
  }
  // The same in contiguous memory, from the front.
  int64_t position(int64_t tap) const {
    return offset(tap, kernel.height * kernel.width, kernel.width, 1);
  }
};

}  // namespace densenet_efficient::cpu
