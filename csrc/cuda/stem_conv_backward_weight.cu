// stem_conv, backward to the weight: dweight [K, C, 7, 7] = sum over the pixels of dy
// [N, OH, OW, K] of dy^T times the windows of x [N, H, W, C] that they come from (see
// stem_conv_forward.cu). There is no gradient of x.
//
// Tile: that of the forward pass. Who owns what: a warp for each of the kernel's seven rows, with
// 7 C columns of the gradient for all outputs (64 or 96; more in several columns of the grid) in
// registers for the whole run; a block walks over a static range of tiles and, within a tile, over
// rows of dy, of which cp.async loads the next while this one is multiplied.
// The depth of the products is pixels: dy comes transposed from shared memory, the windows, which
// overlap, pixel by pixel as in the forward pass, and are transposed between registers.
// Bytes: dy once (2 M K), x about 1.4 times (from the L2 cache), partial sums 4 * 49 K C for each
// block, twice.
// Sums: fp32 in registers over the block's pixels in order; blocks in a second pass.
// Pixels past the end of a row have dy = 0 and windows of zeros, channels past the end dy = 0.
#include "reduce/finish.cuh"
#include "stem_conv/windows.cuh"
#include "workspace.h"

namespace densenet_efficient {
namespace {

using Tiling = tiling::StemConvBackwardWeight;

struct StemConvBackwardWeight {
  device::RowTensor dy;  // [N * OH * OW, K]
  StemImages x;
  float* partial;  // [blocks, pitch], a row as dweight lies in memory
  int64_t pitch;
  int channel_step, tap_step;  // of dweight
  int outputs;                 // K
};

// A row of dy, in panels of 32 outputs: a thread has a chunk of two pixels in each.
template <typename T, int kUnits>
struct RowLoader {
  static constexpr int kStep = Tiling::kThreads / 4;  // pixels from its first to its second
  static_assert(2 * kStep == StemConvTiling::kColumns && kStep % 8 == 0);
  const StemConvBackwardWeight& args;
  const StemConvTiling& plan;
  int output0;
  bool whole;  // all of the block's outputs exist, aligned
  int pixel, offset, from, pitch;

  __device__ __forceinline__ RowLoader(const StemConvBackwardWeight& args,
                                       const StemConvTiling& plan, int output0)
      : args(args), plan(plan), output0(output0) {
    using namespace device;
    whole = args.dy.vector == kChunk<T> && output0 + 32 * kUnits <= args.outputs;
    pixel = thread_index() >> 2;
    offset = panel_offset<T>(pixel, thread_index() & 3);
    pitch = static_cast<int>(args.dy.stride) * static_cast<int>(sizeof(T));
    from = pixel * pitch + 16 * (thread_index() & 3);
  }

  __device__ __forceinline__ void load(unsigned char* stage, const StemConvTile& tile,
                                       int row) const {
    using namespace device;
    const int64_t first =
        (tile.image * plan.out_height + tile.row + row) * plan.out_width + tile.column;
    const int pixels = min(plan.strip_width, plan.out_width - tile.column);
    if (!whole) {
#pragma unroll 1
      for (int panel = 0; panel < kUnits; ++panel)
        copy_rows<T>(stage + panel * Tiling::kPanelBytes, args.dy,
                     {.position = 0,
                      .row0 = first,
                      .begin = 0,
                      .end = pixels,
                      .rows = plan.strip_width,
                      .channel = output0 + 32 * panel,
                      .channels = args.outputs},
                     Tiling::kThreads);
      return;
    }
    const unsigned char* const row0 =
        reinterpret_cast<const unsigned char*>(args.dy.at<T>(first, output0)) + from;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const unsigned char* const own = advance(row0, i * kStep, pitch);
      if (pixel + i * kStep >= plan.strip_width) continue;
#pragma unroll
      for (int panel = 0; panel < kUnits; ++panel)
        cp_async<16>(stage + offset + i * kStep * kPanelRowBytes + panel * Tiling::kPanelBytes,
                     own + panel * kPanelRowBytes, pixel + i * kStep < pixels ? 16 : 0);
    }
  }
};

template <typename T, int C, int kUnits>
__global__ void __launch_bounds__(Tiling::kThreads, Tiling::resident(C, kUnits))
    stem_conv_backward_weight_kernel(StemConvBackwardWeight args, StemConvTiling plan) {
  using namespace device;
  constexpr StemWindow kWindow{C};
  constexpr int kEights = kWindow.row_eights(), kPixelBytes = 2 * C;
  constexpr int kZeros = Tiling::zero_offset(kUnits), kPixels = Tiling::input_offset(kUnits);
  const int lane = lane_index(), g = lane >> 2, t = lane & 3, kh = warp_index();
  const int output0 = block_y() * kUnits * 32;
  unsigned char* const shared = shared_memory();
  int of_dy[kPointers<T>];
  of_dy[0] = byte_offset<T>(a_depth<T>(lane, 0), 0, a_byte<T>(lane));

  if (thread_index() < Tiling::kZeroBytes / 4)
    shared_store(shared + kZeros + 4 * thread_index(), 0u);
  const int first_tile = static_cast<int>(int64_t(plan.tiles) * block_x() / grid_x());
  const int last_tile = static_cast<int>(int64_t(plan.tiles) * (block_x() + 1) / grid_x());
  float acc[2 * kUnits][kEights][4] = {};
  int stage = 0;
  const RowLoader<T, kUnits> loader(args, plan, output0);
  if (first_tile < last_tile) loader.load(shared, StemConvTile(plan, first_tile), 0);
  cp_async_commit();
  for (int index = first_tile; index < last_tile; ++index) {
    const StemConvTile tile(plan, index);
    sync_threads();  // everyone is done with the tile before
    stage_pixels<T, C>(shared + kPixels, args.x, plan, tile, StemWindow::kSize);
    const int pixels = min(plan.strip_width, plan.out_width - tile.column);
#pragma unroll 1
    for (int row = 0; row < tile.rows; ++row) {
      cp_async_wait<0>();
      sync_threads();
      const int next = Tiling::stage_bytes(kUnits) - stage;
      if (row + 1 < tile.rows)
        loader.load(shared + next, tile, row + 1);
      else if (index + 1 < last_tile)
        loader.load(shared + next, StemConvTile(plan, index + 1), 0);
      cp_async_commit();
      const int windows = kPixels + (2 * row + kh) * StemConvTiling::row_bytes(C) + 4 * t;
#pragma unroll 1
      for (int pixel = 0; pixel < pixels; pixel += 16) {
        uint32_t b[kEights][2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int own = pixel + g + 8 * half;
          const int at = own < pixels ? windows + 2 * own * kPixelBytes : kZeros + 4 * t;
#pragma unroll
          for (int i = 0; i < kEights; ++i)
            b[i][half] = transpose_8x8(shared_load<uint32_t>(shared + at + 16 * i));
        }
        const unsigned char* const dy = shared + stage + pixel * kPanelRowBytes;
#pragma unroll
        for (int m = 0; m < 2 * kUnits; ++m) {
          uint32_t a[4];
          load_a_transposed<T>(a, dy + sixteen_offset<T>(m, Tiling::kPanelBytes), of_dy,
                               sixteen_swizzle<T>(m));
#pragma unroll
          for (int i = 0; i < kEights; ++i) multiply_add<T>(acc[m][i], a, b[i]);
        }
      }
      stage = next;
    }
  }

  float* const partial = args.partial + block_x() * args.pitch;
  constexpr int kTaps = StemWindow::kSize * StemWindow::kSize;
#pragma unroll
  for (int m = 0; m < 2 * kUnits; ++m) {
#pragma unroll
    for (int i = 0; i < kEights; ++i) {
#pragma unroll
      for (int part = 0; part < 4; ++part) {
        const int output = output0 + 16 * m + g + part / 2 * 8, value = 8 * i + 2 * t + part % 2;
        if (output < args.outputs && value < kWindow.row_values())
          global_store(partial + output * kTaps * C + value % C * args.channel_step +
                           (StemWindow::kSize * kh + value / C) * args.tap_step,
                       acc[m][i][part]);
      }
    }
  }
  const int64_t past = int64_t(args.outputs) * kTaps * C + thread_index();
  if (block_y() == 0 && past < args.pitch) global_store(partial + past, 0.0f);
}

__global__ void __launch_bounds__(kSumThreads, 2)
    stem_conv_backward_weight_finish_kernel(SumPartials<float> weight, SumPartials<float> norm) {
  finish_sums<1>(weight, norm);
}

void stem_conv_backward_weight(Tensor dy, Tensor x, Tensor dweight) {
  const arguments::StemConvBackwardWeight call(dy, x, dweight);
  const Launcher launcher(call.lead);
  dispatch_half(dy.scalar_type(), [&]<typename T>(T) {
    const bool any = call.N * call.H * call.W > 0;
    const Tiling tiling(call.N, call.H, call.W, call.C, call.K, launcher.device());
    const Workspace partial(x, any ? tiling.bytes : 0);
    if (any) {
      const StemConvBackwardWeight args{.dy = row_tensor(call.dy),
                                        .x = stem_images(x),
                                        .partial = partial.data<float>(),
                                        .pitch = tiling.pitch,
                                        .channel_step = static_cast<int>(call.dweight.channel),
                                        .tap_step = static_cast<int>(call.dweight.tap),
                                        .outputs = static_cast<int>(call.K)};
      dispatch_stem_conv(call.C, tiling.units, [&]<int C, int kUnits>() {
        launcher.launch<&stem_conv_backward_weight_kernel<T, C, kUnits>>(stem_conv_launch(tiling),
                                                                         args, tiling.tiling);
      });
    }
    // All of dweight as one row.
    const int64_t values = call.K * call.dweight.channels;
    launch_finish<&stem_conv_backward_weight_finish_kernel, 1>(
        launcher,
        weight_sums(partial.data<const float>(), any ? tiling.tiling.blocks : 0, 1, values, 1,
                    tiling.pitch, output_rows<float>(call.dweight).data),
        SumPartials<float>{});
  });
}

}  // namespace
}  // namespace densenet_efficient

DE_REGISTER(library) {
  library.impl("stem_conv_backward_weight",
               TORCH_BOX(&densenet_efficient::stem_conv_backward_weight));
}
