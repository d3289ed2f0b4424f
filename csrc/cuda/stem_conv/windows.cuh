// What both directions of the stem's convolution share: where a tile is, and its pixels in shared
// memory.
//
// A row of pixels lies there channels last, in the products' dtype, from the first column that the
// tile's first window sees: the seven pixels of a window's row are 7 C neighbouring values, from an
// even one on (windows are two pixels apart), so that a lane takes its operands of a product by
// four-byte loads. Columns and rows outside of the image are zeros.
#pragma once

#include "../gemm/row_tensor.h"
#include "../tiling/stem_conv.h"

namespace densenet_efficient {

using tiling::StemConvTiling, tiling::StemWindow;

// x [N, H, W, C] by its strides in elements, in the products' dtype or in float32.
struct StemImages {
  const void* data;
  int64_t image, row, channel;
  int pixel;
  bool is_float;
};

inline StemImages stem_images(const Tensor& x) {
  const auto strides = x.strides();
  return {x.const_data_ptr(),
          strides[0],
          strides[1],
          strides[3],
          static_cast<int>(strides[2]),
          x.scalar_type() == ScalarType::Float};
}

// Two neighbouring values, of which either may not exist: a word of the products' dtype.
template <typename T, typename X>
__device__ __forceinline__ uint32_t word_of(const X* first, bool has_first, const X* second,
                                            bool has_second DE_HERE) {
  using namespace device;
  if constexpr (sizeof(X) == 4) {
    const float low = has_first ? global_load_constant<float>(first DE_AT) : 0.0f;
    const float high = has_second ? global_load_constant<float>(second DE_AT) : 0.0f;
    return pack<T>(low, high);
  } else {
    const uint32_t low = has_first ? global_load_constant<uint16_t>(first DE_AT) : 0;
    const uint32_t high = has_second ? global_load_constant<uint16_t>(second DE_AT) : 0;
    return low | high << 16;
  }
}

struct StemConvTile {
  int64_t image;
  int row, rows;  // of y: the first, and how many
  int column;     // of y: the first

  __device__ __forceinline__ StemConvTile(const StemConvTiling& plan, int tile) {
    const int strip = tile % plan.strips, rest = tile / plan.strips;
    image = rest / plan.bands;
    row = rest % plan.bands * plan.band_height;
    rows = min(plan.band_height, plan.out_height - row);
    column = strip * plan.strip_width;
  }
};

// A warp takes a row at a time, a lane two pixels.
template <typename T, int C, typename X>
__device__ __forceinline__ void stage_pixels(unsigned char* shared, const StemImages& x,
                                             const StemConvTiling& plan, const StemConvTile& tile,
                                             int warps) {
  using namespace device;
  constexpr int kStride = StemWindow::kStride, kPadding = StemWindow::kPadding;
  const int pairs = plan.strip_width + 3, rows = kStride * tile.rows + 5;
  const int left = kStride * tile.column - kPadding, top = kStride * tile.row - kPadding;
  const X* const image = static_cast<const X*>(x.data) + tile.image * x.image;
  const int step = x.pixel * static_cast<int>(sizeof(X));
#pragma unroll 1
  for (int row = warp_index(); row < rows; row += warps) {
    sync_warp();  // lanes that have no last pair wait for the others
    const int h = top + row;
    const bool inside = h >= 0 && h < plan.height;
    const X* from[C];
#pragma unroll
    for (int c = 0; c < C; ++c) from[c] = image + (inside ? h : 0) * x.row + c * x.channel;
    unsigned char* const to = shared + row * StemConvTiling::row_bytes(C);
#pragma unroll 2
    for (int pair = lane_index(); pair < pairs; pair += 32) {
      const int w = left + 2 * pair;
      const bool exists[2] = {inside && w >= 0 && w < plan.width,
                              inside && w + 1 >= 0 && w + 1 < plan.width};
      const auto at = [&](int i) { return advance(from[i % C], w + i / C, step); };
#pragma unroll
      for (int i = 0; i < 2 * C; i += 2)
        shared_store(to + (pair * C + i / 2) * 4,
                     word_of<T>(at(i), exists[i / C], at(i + 1), exists[(i + 1) / C]));
    }
  }
}

template <typename T, int C>
__device__ __forceinline__ void stage_pixels(unsigned char* shared, const StemImages& x,
                                             const StemConvTiling& plan, const StemConvTile& tile,
                                             int warps) {
  if (x.is_float)
    stage_pixels<T, C, float>(shared, x, plan, tile, warps);
  else
    stage_pixels<T, C, T>(shared, x, plan, tile, warps);
}

// Which of a lane's two values of the last eight of a window's row are the window's, as a mask of
// the word: those after it are other pixels', which may not be finite.
template <int C>
__device__ __forceinline__ uint32_t last_word_mask() {
  constexpr StemWindow kWindow{C};
  const int left =
      kWindow.row_values() - 8 * (kWindow.row_eights() - 1) - 2 * (device::lane_index() & 3);
  return left >= 2 ? 0xffffffffu : left == 1 ? 0x0000ffffu : 0u;
}

// The launch of a direction, whose tiling has the type Tiling.
template <typename Tiling>
LaunchShape stem_conv_launch(const Tiling& of) {
  return {.grid_x = of.tiling.blocks,
          .grid_y = of.output_blocks,
          .block = Tiling::kThreads,
          .shared_bytes = of.shared_bytes,
          .tiles = of.tiling.tiles,
          .ranges = of.tiling.blocks};
}

// Calls f<C, kUnits>() for the channels of x and the units of outputs of a block.
template <typename F>
void dispatch_stem_conv(int64_t channels, int units, F&& f) {
  const auto with = [&]<int C>() {
    units == 2 ? f.template operator()<C, 2>() : f.template operator()<C, 3>();
  };
  switch (channels) {
    case 1: return with.template operator()<1>();
    case 2: return with.template operator()<2>();
    case 3: return with.template operator()<3>();
    default: return with.template operator()<4>();
  }
}

// dispatch_activation for the dtype of the products: the 16-bit types.
template <typename F>
void dispatch_half(ScalarType dtype, F&& f) {
  return dtype == ScalarType::BFloat16 ? f(BFloat16{}) : f(Half{});
}

}  // namespace densenet_efficient
