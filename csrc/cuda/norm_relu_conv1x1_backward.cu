// norm_relu_conv1x1, backward: from the masked gradient dz_y of the norm that follows y,
//   dy = a_y * dz_y - p - (y - mean_y) * q                        [M, K], never written
//   dz = (dy @ weight) * [a * x + s > 0]                          [M, C], never written
//   dx += a * dz,  dweight = dy^T @ relu(a * x + s) [K, C],  dnorm [2, C]: sums of dz * x_hat, dz.
//
// Tile: 32 rows. Who owns what: a warp owns 16 channels: their columns of the weight (in registers
// as tensor-core operands for the whole run), their dx, their sums, and their columns of dweight
// (K x 16 accumulators in registers). A block of up to four warps owns up to 64 channels and a
// static range of row tiles; its warps share the tile of dy, which they form in place from dz_y.
// Nothing else passes between warps, so one barrier a tile is enough; cp.async runs up to two tiles
// ahead. Bytes: x and dx in, dx out (2 * 3 M C), dz_y and y once for every 64 channels (2 * 2 M K,
// from the L2 cache after the first: blocks of the same rows are neighbours), partial sums
// 4 (K + 2) C for each row block, twice.
// Sums: fp32 in registers over the block's rows, in row order; blocks in a second pass.
// Rows past the end get dy = 0; channels past the end get a = s = 0.
#include "conv1x1/warp_backward.cuh"
#include "reduce/finish.cuh"
#include "workspace.h"

namespace densenet_efficient {
namespace {

using namespace conv1x1_backward;

template <typename T, int kOutputs>
__global__ void __launch_bounds__(kMaxThreads, Tiling::resident(kOutputs, sizeof(T)))
    norm_relu_conv1x1_backward_kernel(Backward args) {
  using namespace device;
  const BackwardLayout<T, kOutputs> layout{args.warps};
  constexpr int kStages = BackwardLayout<T, kOutputs>::kStages;
  const int threads = 32 * args.warps, thread = thread_index(), warp = warp_index();
  const int channel_block = block_x() % args.channel_blocks;
  const int row_block = block_x() / args.channel_blocks;
  const int row_blocks = grid_x() / args.channel_blocks;
  const int block_channel0 = channel_block * 16 * args.warps, channel0 = block_channel0 + 16 * warp;
  const int64_t tiles = (args.rows + kTileRows - 1) / kTileRows;
  const int64_t first_tile = tiles * row_block / row_blocks;
  const int64_t last_tile = tiles * (row_block + 1) / row_blocks;
  unsigned char* shared = shared_memory();

  unsigned char* correction = shared + layout.correction_offset();
  for (int column = thread; column < kOutputs; column += threads)
    shared_store(
        correction + column % kChunk<T> * layout.kCorrectionPitch + column / kChunk<T> * 16,
        load_entries(args.correction, column, args.outputs));
  float* norm = reinterpret_cast<float*>(shared + layout.norm_offset());
  for (int i = thread; i < kTileNormRows * 16 * args.warps; i += threads) {
    const int row = i / (16 * args.warps), channel = block_channel0 + i % (16 * args.warps);
    shared_store(norm + i,
                 channel < args.channels
                     ? global_load<float>(args.norm.data + row * args.norm.stride + channel)
                     : 0.0f);
  }
  WarpChannels<T, kOutputs> own(args, norm + 16 * warp, channel0);

  // Every thread copies chunks of one column of dz_y and y, and forms dy of exactly these. Eight
  // threads cover two rows of a panel, a team of them two rows of all panels.
  constexpr int kTeam = 8 * layout.kPanels;
  const int row_step = 2 * (threads / kTeam);
  const int column_chunk = thread % kTeam / 8 * 4 + thread % 4;
  const int copy_row =
      thread < threads / kTeam * kTeam ? 2 * (thread / kTeam) + thread / 4 % 2 : kTileRows;
  const int owned_end = block_channel0 + 16 * args.warps;
  const int channel_end = owned_end < args.channels ? owned_end : args.channels;
  const auto load = [&](int64_t tile, int stage_index) {
    if (tile < last_tile) {
      unsigned char* stage = shared + stage_index * layout.stage_bytes();
      const int64_t row0 = tile * kTileRows;
      const int rows = static_cast<int>(min(args.rows - row0, int64_t(kTileRows)));
      copy_gradient<T, kOutputs>(stage, layout.y_offset(), args, row0, rows, copy_row, row_step,
                                 column_chunk);
      for (int panel = 0; panel < layout.x_panels(args.warps); ++panel) {
        const RowCopy copy{
            0, row0, 0, rows, kTileRows, block_channel0 + panel * kPanelChannels<T>, channel_end};
        unsigned char* to = stage + panel * kPanelBytes;
        copy_rows<T>(to + layout.x_offset(), args.x, copy, threads);
        copy_rows<T>(to + layout.dx_offset(), args.dx, copy, threads);
      }
    }
    cp_async_commit();
  };
  for (int stage = 0; stage < kStages - 1; ++stage) load(first_tile + stage, stage);
  sync_threads();  // the correction and the norm are there

  int stage_index = 0;
  for (int64_t tile = first_tile; tile < last_tile; ++tile) {
    unsigned char* stage = shared + stage_index * layout.stage_bytes();
    const int64_t row0 = tile * kTileRows;
    const int valid_rows =
        args.rows - row0 < kTileRows ? static_cast<int>(args.rows - row0) : kTileRows;
    cp_async_wait<kStages - 2>();
    form_dy<T, kOutputs>(stage, layout.y_offset(), correction, row_step, copy_row, column_chunk,
                         valid_rows);
    sync_threads();
    load(tile + kStages - 1, stage_index == 0 ? kStages - 1 : stage_index - 1);
    const unsigned char* x = stage + layout.x_offset() + sixteen_offset<T>(warp, kPanelBytes);
    const unsigned char* dx = stage + layout.dx_offset() + sixteen_offset<T>(warp, kPanelBytes);
    const int chunk0 = sixteen_swizzle<T>(warp) / 16;
#pragma unroll
    for (int row = 0; row < kTileRows; row += 16) {
      own.data_gradient(stage, x, dx, chunk0, row, valid_rows, args, row0);
      if (!args.weight_gradient) continue;
#pragma unroll
      for (int depth = 0; depth < 16; depth += kDepth<T>)
        own.weight_gradient(stage, x, chunk0, row + depth);
    }
    stage_index = stage_index == kStages - 1 ? 0 : stage_index + 1;
  }
  own.write(args, args.partial + row_block * (args.outputs + 2) * args.pitch);
}

__global__ void __launch_bounds__(kFinishThreads)
    norm_relu_conv1x1_backward_finish_kernel(SumPartials<float> weight, SumPartials<float> norm) {
  finish_sums<1>(weight, norm);
}

// ---- Launcher -----------------------------------------------------------------------------------

template <typename T, int kOutputs>
void launch_backward(const Launcher& launcher, const Backward& args, int64_t blocks) {
  const BackwardLayout<T, kOutputs> layout{args.warps};
  launcher.launch<&norm_relu_conv1x1_backward_kernel<T, kOutputs>>(
      {.grid_x = blocks,
       .block = 32 * args.warps,
       .shared_bytes = layout.shared_bytes(),
       .tiles = ceil_div(args.rows, kTileRows),
       .ranges = blocks / args.channel_blocks},
      args);
}

// For outputs from `first` on, as many as a kernel takes. More outputs take several calls: the
// ReLU's mask does not depend on them, so dx and dnorm accumulate.
template <typename T>
void backward(const Launcher& launcher, const Tensor& like, Backward args, int64_t first,
              float* dweight, Rows<float> dnorm) {
  const Tiling tiling(args.rows, args.channels, args.outputs, sizeof(T), launcher.device());
  const Workspace partial(like, tiling.bytes);
  args.partial = partial.data<float>();
  args.pitch = tiling.pitch;
  args.warps = tiling.warps;
  args.channel_blocks = static_cast<int>(tiling.channel_blocks);
  args.weight_gradient = dweight != nullptr;
  const int64_t blocks = tiling.row_blocks * tiling.channel_blocks;
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
  launch_finish<&norm_relu_conv1x1_backward_finish_kernel, 1>(launcher, of_weight, of_norm);
}

void norm_relu_conv1x1_backward(Tensor dz_y, Tensor y, Tensor correction, Tensor x, Tensor norm,
                                Tensor weight, Tensor dx, OptionalTensor dweight, Tensor dnorm) {
  const arguments::NormReluConv1x1Backward call(dz_y, y, correction, x, norm, weight, dx, dweight,
                                                dnorm);
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
      backward<T>(launcher, x, args, first, output_rows<float>(call.dweight).data,
                  output_rows<float>(call.dnorm));
    });
  });
}

}  // namespace
}  // namespace densenet_efficient

DE_REGISTER(library) {
  library.impl("norm_relu_conv1x1_backward",
               TORCH_BOX(&densenet_efficient::norm_relu_conv1x1_backward));
}
