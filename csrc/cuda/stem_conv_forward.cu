// stem_conv, forward: y [N, OH, OW, K] = conv(x, weight), 7 x 7, stride 2, padding 3, no bias, of
// x [N, H, W, C] with one to four channels; OH = ceil(H / 2), OW = ceil(W / 2).
//
// Tile: up to eight output rows by 112 columns; a block walks over a static range of tiles and has
// all K weights (64 or 96; more in several columns of the grid) in shared memory for the whole run.
// Who owns what: a warp owns 32 of the tile's pixels at a time, two groups of 16 neighbours of a
// row, with all outputs. The depth of its products is a window's seven rows of 7 C values, each
// padded to eights by weights of zero; values there are masked, since 0 * inf is not 0.
// Bytes: y once (2 M K), x about 1.4 times (the rows that two tiles see, from the L2 cache).
// Sums: fp32 accumulators over a window; one rounding, when y is stored. x and weight are in y's
// dtype or in float32, which is rounded to it first.
// Outputs change places within 32, so that a lane's accumulators are eight neighbours.
#include "stem_conv/windows.cuh"

namespace densenet_efficient {
namespace {

using Tiling = tiling::StemConvForward;

struct StemConvForward {
  StemImages x;
  const void* weight;        // [K, C, 7, 7]
  int64_t weight_stride[4];  // in elements
  bool weight_is_float;
  device::RowTensor y;  // [N * OH * OW, K]
  int outputs;          // K
};

// The block's weights [units * 32, pitch], zeros where there are none.
template <typename T, int C, int kUnits>
__device__ __forceinline__ void pack_weights(unsigned char* shared, const StemConvForward& args,
                                             int output0) {
  using namespace device;
  constexpr StemWindow kWindow{C};
  constexpr int kWords = kWindow.weight_pitch() / 4, kEights = kWindow.row_eights();
  constexpr int kValues = kWindow.row_values();
  for (int i = thread_index(); i < 32 * kUnits * kWords; i += Tiling::kThreads) {
    const int row = i / kWords, word = i % kWords, eight = word / 4;
    const int output = output0 + row / 32 * 32 + row % 8 / 2 * 8 + row % 32 / 8 * 2 + row % 2;
    const int kh = eight / kEights, value = eight % kEights * 8 + word % 4 * 2;
    const bool inside = kh < StemWindow::kSize && output < args.outputs;
    const int64_t from = output * args.weight_stride[0] + kh * args.weight_stride[2];
    const auto at = [&](int v) {
      return from + v % C * args.weight_stride[1] + v / C * args.weight_stride[3];
    };
    const bool first = inside && value < kValues, second = inside && value + 1 < kValues;
    const auto load = [&]<typename W>(const W* weight) {
      return word_of<T>(weight + at(value), first, weight + at(value + 1), second);
    };
    shared_store(shared + 4 * i, args.weight_is_float ? load(static_cast<const float*>(args.weight))
                                                      : load(static_cast<const T*>(args.weight)));
  }
}

template <typename T, int C, int kUnits>
__global__ void __launch_bounds__(Tiling::kThreads, Tiling::resident(C, kUnits))
    stem_conv_forward_kernel(StemConvForward args, StemConvTiling plan) {
  using namespace device;
  constexpr StemWindow kWindow{C};
  constexpr int kSteps = kWindow.steps(), kEights = kWindow.row_eights();
  constexpr int kRowBytes = StemConvTiling::row_bytes(C), kPixelBytes = 2 * C;
  constexpr int kWarps = Tiling::kThreads / 32;
  const int lane = lane_index(), g = lane >> 2, t = lane & 3;
  const int output0 = block_y() * kUnits * 32;
  unsigned char* const pixels = shared_memory() + Tiling::input_offset(C, kUnits);
  const unsigned char* const weights =
      shared_memory() + b_row(lane) * kWindow.weight_pitch() + 16 * b_chunk(lane);
  const uint32_t mask = last_word_mask<C>();

  const int pitch = static_cast<int>(args.y.stride) * static_cast<int>(sizeof(T));
  const int channel = output0 + 8 * t, left = args.outputs - channel;
  const bool whole = args.y.vector == kChunk<T> && output0 + 32 * kUnits <= args.outputs;
  const int groups = plan.strip_width / 16;  // of pixels in a row
  const int inverse = 65536 / groups + 1;    // exact for as many as a tile has

  pack_weights<T, C, kUnits>(shared_memory(), args, output0);
  const int first_tile = static_cast<int>(int64_t(plan.tiles) * block_x() / grid_x());
  const int last_tile = static_cast<int>(int64_t(plan.tiles) * (block_x() + 1) / grid_x());
  for (int index = first_tile; index < last_tile; ++index) {
    const StemConvTile tile(plan, index);
    sync_threads();  // everyone is done with the tile before
    stage_pixels<T, C>(pixels, args.x, plan, tile, kWarps);
    sync_threads();
    const int all = tile.rows * groups;
    T* const tile_pixels = args.y.at<T>(
        (tile.image * plan.out_height + tile.row) * plan.out_width + tile.column, channel);
#pragma unroll 1
    for (int first = 2 * warp_index(); first < all; first += 2 * kWarps) {
      int row[2], column[2], at[2];
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        const int group = min(first + m, all - 1);
        row[m] = (group * inverse) >> 16;
        column[m] = 16 * (group - row[m] * groups) + g;
        at[m] = 2 * row[m] * kRowBytes + 2 * column[m] * kPixelBytes + 4 * t;
      }
      float acc[2][4 * kUnits][4] = {};
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        uint32_t a[2][4];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int eight = 2 * step + half, kh = eight / kEights, in_row = eight % kEights;
#pragma unroll
          for (int m = 0; m < 2; ++m) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              uint32_t& word = a[m][2 * half + i];
              word = 0;
              if (kh == StemWindow::kSize) continue;
              word = shared_load<uint32_t>(pixels + at[m] + kh * kRowBytes + 16 * in_row +
                                           16 * i * kPixelBytes);
              if (in_row == kEights - 1) word &= mask;
            }
          }
        }
#pragma unroll
        for (int pair = 0; pair < 2 * kUnits; ++pair) {
          uint32_t b[4];
          ldmatrix_x4(b, weights + 16 * pair * kWindow.weight_pitch() + 32 * step);
#pragma unroll
          for (int m = 0; m < 2; ++m)
            multiply_add_pair<T>(acc[m][2 * pair], acc[m][2 * pair + 1], a[m], b);
        }
      }
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int to_column = column[m] + 8 * half;
          if (first + m >= all || tile.column + to_column >= plan.out_width) continue;
          T* const to = advance(tile_pixels, row[m] * plan.out_width + to_column, pitch);
#pragma unroll
          for (int unit = 0; unit < kUnits; ++unit) {
            const auto two = [&](int j) {
              const float (&of)[4] = acc[m][4 * unit + j];
              return pack<T>(of[2 * half], of[2 * half + 1]);
            };
            const uint4 chunk{two(0), two(1), two(2), two(3)};
            if (whole)
              global_store(to + 32 * unit, chunk);
            else if (left > 32 * unit)
              store_chunk(to + 32 * unit, chunk, left - 32 * unit, args.y.vector);
          }
        }
      }
    }
  }
}

void stem_conv_forward(Tensor x, Tensor weight, Tensor y) {
  const arguments::StemConvForward call(x, weight, y);
  if (call.N * call.H * call.W == 0) return;
  const Launcher launcher(call.lead);
  dispatch_half(y.scalar_type(), [&]<typename T>(T) {
    const Tiling tiling(call.N, call.H, call.W, call.C, call.K, launcher.device());
    const auto strides = weight.strides();
    const StemConvForward args{.x = stem_images(x),
                               .weight = weight.const_data_ptr(),
                               .weight_stride = {strides[0], strides[1], strides[2], strides[3]},
                               .weight_is_float = weight.scalar_type() == ScalarType::Float,
                               .y = output_row_tensor(call.y),
                               .outputs = static_cast<int>(call.K)};
    dispatch_stem_conv(call.C, tiling.units, [&]<int C, int kUnits>() {
      launcher.launch<&stem_conv_forward_kernel<T, C, kUnits>>(stem_conv_launch(tiling), args,
                                                               tiling.tiling);
    });
  });
}

}  // namespace
}  // namespace densenet_efficient

DE_REGISTER(library) {
  library.impl("stem_conv_forward", TORCH_BOX(&densenet_efficient::stem_conv_forward));
}
