// norm_relu_conv1x1, backward: from the masked gradient dz_y of the norm that follows y,
//   dy = a_y * dz_y - p - (y - mean_y) * q                        [M, K], never written
//   dz = (dy @ weight) * [a * x + s > 0]                          [M, C], never written
//   dx += a * dz,  dweight = dy^T @ relu(a * x + s) [K, C],  dnorm [2, C]: sums of dz * x_hat, dz.
//
// Tile: 32 rows. Who owns what: a warp owns 16 channels: their columns of the weight (in registers
// as tensor-core operands for the whole run), their dx, their sums, and their columns of dweight
// (K x 16 accumulators in registers). A block of up to twelve warps owns up to 192 channels and a
// static range of row tiles; its warps share the tile of dy, which they form in place from dz_y.
// Nothing else passes between warps, so one barrier a tile is enough; cp.async runs up to two tiles
// ahead.
// Bytes: x and dx in, dx out (2 * 3 M C), dz_y and y once for every 192 channels (2 * 2 M K,
// from the L2 cache after the first: blocks of the same rows are neighbours), partial sums
// 4 (K + 2) C for each row block, twice.
// Sums: fp32 in registers over the block's rows, in row order; blocks in a second pass.
// Rows past the end get dy = 0; channels past the end get a = s = 0.
#include <type_traits>

#include "conv1x1/warp_backward.cuh"
#include "reduce/finish.cuh"
#include "workspace.h"

namespace densenet_efficient {
namespace {

using namespace conv1x1_backward;

template <typename T, int kOutputs>
__global__ void __launch_bounds__(32 * Tiling::max_warps(kOutputs, sizeof(T)), 1)
    norm_relu_conv1x1_backward_kernel(Backward args) {
  using namespace device;
  const Layout layout{sizeof(T), kOutputs, args.warps};
  constexpr int kStages = Layout{sizeof(T), kOutputs, 1}.stages();
  const int threads = 32 * args.warps, thread = thread_index(), warp = warp_index();
  const int channel_block = block_x() % args.channel_blocks;
  const int row_block = block_x() / args.channel_blocks;
  const int row_blocks = grid_x() / args.channel_blocks;
  const int block_channel0 = channel_block * 16 * args.warps, channel0 = block_channel0 + 16 * warp;
  const int64_t tiles = (args.rows + kTileRows - 1) / kTileRows;
  const int64_t first_tile = tiles * row_block / row_blocks, row0 = first_tile * kTileRows;
  const int count = static_cast<int>(tiles * (row_block + 1) / row_blocks - first_tile);
  // All tiles are whole but, of the last range, the last one: it has so many rows.
  const int64_t rows = args.rows - row0;
  const int whole_tiles = rows < int64_t(count) * kTileRows ? count - 1 : count;
  const int last_rows = static_cast<int>(rows - int64_t(count - 1) * kTileRows);
  unsigned char* shared = shared_memory();

  unsigned char* correction = shared + args.correction_offset;
  for (int column = thread; column < kOutputs; column += threads)
    shared_store(
        correction + column % kChunk<T> * layout.correction_pitch() + column / kChunk<T> * 16,
        kept_correction<T>(load_entries(args.correction, column, args.outputs)));
  float* norm = reinterpret_cast<float*>(shared + args.norm_offset);
  for (int i = thread; i < Layout::kNormRows * 16 * args.warps; i += threads) {
    const int row = i / (16 * args.warps), channel = block_channel0 + i % (16 * args.warps);
    shared_store(norm + i,
                 channel < args.channels
                     ? global_load<float>(args.norm.data + row * args.norm.stride + channel)
                     : 0.0f);
  }
  WarpChannels<T, kOutputs> own(args, norm + 16 * warp, channel0, row0);
  TileLoader<T, kOutputs> loader(args, layout, row0, block_channel0, shared);
  const auto load = [&](int tile, int stage) {
    if (tile < count) loader.load(shared + stage, tile != whole_tiles, last_rows);
    cp_async_commit();
  };
#pragma unroll
  for (int tile = 0; tile < kStages - 1; ++tile) load(tile, tile * args.stage_bytes);
  sync_threads();  // the correction and the norm are there

  int stage = 0, free_stage = (kStages - 1) * args.stage_bytes;
  for (int tile = 0; tile < count; ++tile) {
    const bool all_rows = tile != whole_tiles;
    cp_async_wait<kStages - 2>();
    loader.form_dy(shared + stage, correction, all_rows, last_rows);
    sync_threads();
    load(tile + kStages - 1, free_stage);
    const int rows = all_rows ? kTileRows : last_rows;
    const auto multiply = [&]<bool kWhole>(std::bool_constant<kWhole>) {
#pragma unroll
      for (int row = 0; row < kTileRows; row += 16) {
        uint32_t h[4];
        own.template data_gradient<kWhole>(shared + stage, layout, row, rows - own.lane_row, args,
                                           h);
        if (args.weight_gradient) own.weight_gradient(shared + stage, layout, row, h);
      }
    };
    if (all_rows && own.whole && args.whole_chunks)
      multiply(std::true_type{});
    else
      multiply(std::false_type{});
    own.dx = advance(own.dx, kTileRows, args.pitch);
    free_stage = stage;
    stage = stage == (kStages - 1) * args.stage_bytes ? 0 : stage + args.stage_bytes;
  }
  own.write(args, args.partial + row_block * (args.outputs + 2) * args.partial_pitch);
}

__global__ void __launch_bounds__(kSumThreads, 2)
    norm_relu_conv1x1_backward_finish_kernel(SumPartials<float> weight, SumPartials<float> norm) {
  finish_sums<1>(weight, norm);
}

// ---- Launcher -----------------------------------------------------------------------------------

template <typename T, int kOutputs>
void launch_backward(const Launcher& launcher, const Backward& args, int64_t blocks) {
  launcher.launch<&norm_relu_conv1x1_backward_kernel<T, kOutputs>>(
      {.grid_x = blocks,
       .block = 32 * args.warps,
       .shared_bytes = Layout{sizeof(T), kOutputs, args.warps}.shared_bytes(),
       .tiles = ceil_div(args.rows, kTileRows),
       .ranges = blocks / args.channel_blocks},
      args);
}

// For outputs from `first` on, as many as a kernel takes. More outputs take several calls: the
// ReLU's mask does not depend on them, so dx and dnorm accumulate.
template <typename T>
void backward(const Launcher& launcher, const Tensor& like, Backward args, int64_t first,
              float* dweight, Rows<float> dnorm, const NormCorrection<float>& correction) {
  const Tiling tiling(args.rows, args.channels, args.outputs, sizeof(T), launcher.device());
  const Workspace partial(like, tiling.bytes);
  args.partial = partial.data<float>();
  args.partial_pitch = tiling.pitch;
  args.warps = tiling.warps;
  args.channel_blocks = static_cast<int>(tiling.channel_blocks);
  args.weight_gradient = dweight != nullptr;
  args.gradient_pitch = static_cast<int>(args.dz_y.stride * static_cast<int64_t>(sizeof(T)));
  args.pitch = static_cast<int>(args.dx.stride * static_cast<int64_t>(sizeof(T)));
  constexpr int kWhole = device::kChunk<T>;
  const int aligned = std::min({args.dz_y.vector, args.y.vector, args.x.vector, args.dx.vector});
  args.whole_chunks = aligned == kWhole && args.channels % 4 == 0 && args.outputs % kWhole == 0 &&
                      args.dz_y.stride == args.y.stride && args.x.stride == args.dx.stride;
  const int64_t blocks = tiling.row_blocks * tiling.channel_blocks;
  const Layout layout{sizeof(T), Tiling::together(args.outputs, sizeof(T)), tiling.warps};
  args.stage_bytes = layout.stage_bytes();
  args.dx_offset = layout.dx_offset();
  args.correction_offset = layout.correction_offset();
  args.norm_offset = layout.norm_offset();
  const auto launch = args.outputs <= 64    ? launch_backward<T, 64>
                      : args.outputs <= 128 ? launch_backward<T, 128>
                                            : launch_backward<T, Tiling::max_outputs(sizeof(T))>;
  if (blocks > 0 && args.channels > 0) launch(launcher, args, blocks);
  SumPartials<float> of_weight, of_norm;
  const int64_t block_stride = (args.outputs + kDnormRows) * tiling.pitch;
  if (dweight)
    of_weight = weight_sums<float>(args.partial, tiling.row_blocks, args.outputs, args.channels, 1,
                                   tiling.pitch, dweight + first * args.channels);
  of_norm = norm_sums<float>(args.partial + args.outputs * tiling.pitch, tiling.row_blocks,
                             args.channels, tiling.pitch, dnorm);
  of_weight.block_stride = of_norm.block_stride = block_stride;
  of_norm.accumulate = first > 0;
  of_norm.correction = correction;
  launch_finish<&norm_relu_conv1x1_backward_finish_kernel, 1>(launcher, of_weight, of_norm);
}

void norm_relu_conv1x1_backward(Tensor dz_y, Tensor y, Tensor correction, Tensor x, Tensor norm,
                                Tensor weight, Tensor dx, OptionalTensor dweight, Tensor dnorm,
                                int64_t count, OptionalTensor x_correction) {
  const arguments::NormReluConv1x1Backward call(dz_y, y, correction, x, norm, weight, dx, dweight,
                                                dnorm, count, x_correction);
  dispatch_operands(call.lead, [&]<typename T>(T) {
    const Launcher launcher(call.lead);
    Backward args{};
    args.x = row_tensor(call.x);
    args.norm = float_table(call.norm);
    args.dx = output_row_tensor(call.dx);
    args.rows = call.M;
    args.channels = static_cast<int>(call.C);
    Tiling::for_calls(call.K, sizeof(T), [&](int64_t first, int64_t outputs) {
      args.outputs = static_cast<int>(outputs);
      args.dz_y = row_tensor(call.dz_y).from_channel<T>(static_cast<int>(first));
      args.y = row_tensor(call.y).from_channel<T>(static_cast<int>(first));
      args.correction = float_table(call.correction).from_channel(static_cast<int>(first));
      args.weight = weight_rows(call).from_row<T>(first);
      backward<T>(
          launcher, x, args, first, output_rows<float>(call.dweight).data,
          output_rows<float>(call.dnorm),
          first + outputs == call.K ? correction_of<float>(call, true) : NormCorrection<float>{});
    });
  });
}

}  // namespace
}  // namespace densenet_efficient

DE_REGISTER(library) {
  library.impl("norm_relu_conv1x1_backward",
               TORCH_BOX(&densenet_efficient::norm_relu_conv1x1_backward));
}
