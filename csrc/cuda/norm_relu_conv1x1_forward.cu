// norm_relu_conv1x1, forward: y [M, K] = relu(a * x + s) @ weight^T, and the moments of y as
// stored.
//
// Tile: 32 rows a warp, all K columns (in steps of 64, 128 or 192; more than 192 in several columns
// of the grid), so that each element of x is normalised once, in the registers that feed the tensor
// cores. For 192 columns two warps share their rows, and each normalises them.
// Who owns what: a block walks over a static range of row tiles and, within a tile, over the
// channels in panels of 32; (tile, panel) pairs form one sequence that cp.async runs ahead of, so
// that the loads of the next tile are under way while this one is written. A warp rounds its rows
// into 2 KB of its own, from where they leave in 16-byte stores and enter the warp's running
// moments. Bytes: x once (2 M C), y once (2 M K), the weight once per tile (2 K C, from the L2
// cache). Sums: fp32 accumulators over C; moments exact two-pass over 16 rows, then merged in a
// fixed order: rows of a warp, warps of a block, blocks (second pass, from 12 K bytes a block).
// C tail: x and weight arrive as zeros, and so do scale and shift: relu(0 * 0 + 0) = 0.
#include "gemm/epilogue.cuh"
#include "gemm/row_tensor.h"
#include "reduce/finish.cuh"
#include "tiling/conv1x1.h"
#include "workspace.h"

namespace densenet_efficient {
namespace {

constexpr int kStages = 3;
constexpr int kWarpRows = 32;

struct Forward {
  device::RowTensor x;       // [M, C]
  device::Table norm;        // [4, C]
  device::RowTensor weight;  // [K, C]
  device::RowTensor y;       // [M, K]
  float* partial;            // [blocks, 3, K]: count, mean, M2; null without stats
  int64_t rows;              // M
  int channels;              // C
  int outputs;               // K
  int warps;                 // of a block
  int tiles;
};

// kColumns of y per warp, kSplit warps side by side.
template <typename T, int kColumns, int kSplit>
struct ForwardLayout {
  int warps;
  DE_HOST_DEVICE int tile_rows() const { return warps / kSplit * kWarpRows; }
  DE_HOST_DEVICE int weight_offset() const { return tile_rows() * device::kPanelRowBytes; }
  DE_HOST_DEVICE int norm_offset() const {
    return weight_offset() + kColumns * kSplit * device::kPanelRowBytes;
  }
  DE_HOST_DEVICE int stage_bytes() const { return norm_offset() + device::kScaleShiftBytes<T>; }
  DE_HOST_DEVICE int staging_offset() const { return kStages * stage_bytes(); }
  DE_HOST_DEVICE int moments_offset() const {
    return staging_offset() + warps * device::kStagingBytes;
  }
  DE_HOST_DEVICE int shared_bytes() const {
    return moments_offset() + warps * device::BlockMoments<kColumns>::kWarpBytes;
  }
};

// Two 8-column tiles at a time: one depth of a 32-row warp tile.
template <typename T, int kTiles>
__device__ __forceinline__ void multiply_step(float (&acc)[2][kTiles][4], const unsigned char* x,
                                              const unsigned char* weight,
                                              const unsigned char* norm, int step) {
  using namespace device;
  const int lane = lane_index();
  const int channel = kDepth<T> * step + kOperandChannels<T> * (lane & 3);
  const OperandNorm<T> norm_low = load_operand_norm<T>(norm, channel);
  const OperandNorm<T> norm_high = load_operand_norm<T>(norm, channel + kDepth<T> / 2);
  // Eight rows further on, the order of the chunks is the same.
  x += panel_offset<T>(a_row(lane), a_chunk(lane)) ^ (32 * step);
  weight += panel_offset<T>(b_row(lane), b_chunk(lane)) ^ (32 * step);
  uint32_t a[2][4];
#pragma unroll
  for (int m = 0; m < 2; ++m) {
    ldmatrix_x4(a[m], x + 16 * m * kPanelRowBytes);
    a[m][0] = norm_relu_operand<T>(a[m][0], norm_low);
    a[m][1] = norm_relu_operand<T>(a[m][1], norm_low);
    a[m][2] = norm_relu_operand<T>(a[m][2], norm_high);
    a[m][3] = norm_relu_operand<T>(a[m][3], norm_high);
  }
#pragma unroll
  for (int j = 0; j < kTiles; j += 2) {
    uint32_t b[4];
    ldmatrix_x4(b, weight + 8 * j * kPanelRowBytes);
    round_operands<T>(b);
#pragma unroll
    for (int m = 0; m < 2; ++m) multiply_add_pair<T>(acc[m][j], acc[m][j + 1], a[m], b);
  }
}

template <typename T, int kColumns, int kSplit>
__global__ void __launch_bounds__(kColumns == 64 ? 128 : 256, kColumns == 64 ? 3 : 1)
    norm_relu_conv1x1_forward_kernel(Forward args) {
  using namespace device;
  constexpr int kTiles = kColumns / 8;
  const ForwardLayout<T, kColumns, kSplit> layout{args.warps};
  const int threads = 32 * args.warps, tile_rows = layout.tile_rows();
  const int warp = warp_index(), thread = thread_index();
  const int warp_row = warp / kSplit * kWarpRows, warp_column = warp % kSplit * kColumns;
  const int column0 = block_y() * kColumns * kSplit;
  const int panels = max(1, panels_of<T>(args.channels));
  const int first_tile = static_cast<int>(int64_t(args.tiles) * block_x() / grid_x());
  const int last_tile = static_cast<int>(int64_t(args.tiles) * (block_x() + 1) / grid_x());
  unsigned char* shared = shared_memory();

  const BlockMoments<kColumns> block_moments(shared + layout.moments_offset());
  WarpMoments moments = block_moments.start(warp);

  // The panel that is loaded next, kStages - 1 ahead of the one that is multiplied.
  int load_tile = first_tile;
  int load_panel = 0;
  const int load_row = thread >> 2, load_chunk = thread & 3, load_step = threads >> 2;
  const auto load = [&](int stage) {
    if (load_tile < last_tile) {
      unsigned char* to = shared + stage * layout.stage_bytes();
      const int channel = load_panel * kPanelChannels<T> + load_chunk * kChunk<T>;
      const int valid = channels_left<T>(channel, args.channels);
      const int64_t row0 = int64_t(load_tile) * tile_rows;
#pragma unroll
      for (int i = 0; i < 4 / kSplit; ++i) {
        const int row = load_row + i * load_step;
        copy_chunk(to + panel_offset<T>(row, load_chunk), args.x.at<T>(row0 + row, channel),
                   row0 + row < args.rows ? valid : 0, args.x.vector);
      }
      for (int row = load_row; row < kColumns * kSplit; row += load_step)
        copy_chunk(to + layout.weight_offset() + panel_offset<T>(row, load_chunk),
                   args.weight.at<T>(column0 + row, channel),
                   column0 + row < args.outputs ? valid : 0, args.weight.vector);
      copy_scale_shift<T>(to + layout.norm_offset(), args.norm, load_panel * kPanelChannels<T>,
                          args.channels, threads);
      if (++load_panel == panels) {
        load_panel = 0;
        ++load_tile;
      }
    }
    cp_async_commit();
  };
  for (int stage = 0; stage < kStages - 1; ++stage) load(stage);

  int stage = 0;
  for (int tile = first_tile; tile < last_tile; ++tile) {
    float acc[2][kTiles][4] = {};
    for (int panel = 0; panel < panels; ++panel) {
      cp_async_wait<kStages - 2>();
      sync_threads();
      load(stage == 0 ? kStages - 1 : stage - 1);
      const unsigned char* from = shared + stage * layout.stage_bytes();
#pragma unroll
      for (int step = 0; step < 2; ++step)
        multiply_step<T, kTiles>(acc, from + warp_row * kPanelRowBytes,
                                 from + layout.weight_offset() + warp_column * kPanelRowBytes,
                                 from + layout.norm_offset(), step);
      stage = stage == kStages - 1 ? 0 : stage + 1;
    }
    const int64_t row0 = int64_t(tile) * tile_rows + warp_row;
    const int column = column0 + warp_column;
    const int end = column + kColumns < args.outputs ? column + kColumns : args.outputs;
    write_rows<T, kTiles>(acc, shared + layout.staging_offset() + warp * kStagingBytes, args.y,
                          column, end, args.partial != nullptr, moments,
                          [&](int r) { return row0 + r < args.rows ? row0 + r : int64_t(-1); });
  }
  if (args.partial)
    block_moments.template finish<kSplit>(moments, args.warps,
                                          args.partial + int64_t(block_x()) * 3 * args.outputs,
                                          column0, args.outputs);
}

__global__ void __launch_bounds__(kFinishThreads)
    norm_relu_conv1x1_forward_finish_kernel(MomentPartials<float> args) {
  finish_moments(args);
}

// ---- Launcher -----------------------------------------------------------------------------------

template <typename T, int kColumns, int kSplit>
void launch_forward(const Launcher& launcher, const Forward& args, int64_t blocks) {
  const ForwardLayout<T, kColumns, kSplit> layout{args.warps};
  launcher.launch<&norm_relu_conv1x1_forward_kernel<T, kColumns, kSplit>>(
      {.grid_x = blocks,
       .grid_y = ceil_div(args.outputs, kColumns * kSplit),
       .block = 32 * args.warps,
       .shared_bytes = layout.shared_bytes(),
       .tiles = args.tiles,
       .ranges = blocks},
      args);
}

void norm_relu_conv1x1_forward(Tensor x, Tensor norm, Tensor weight, Tensor y,
                               OptionalTensor stats) {
  const arguments::NormReluConv1x1Forward call(x, norm, weight, y, stats);
  dispatch_operands(call.lead, [&]<typename T>(T) {
    const Launcher launcher(call.lead);
    const tiling::NormReluConv1x1Forward tiling(call.M, call.K, stats.has_value(),
                                                launcher.device());
    const Workspace partial(x, tiling.bytes);
    const Forward args{row_tensor(call.x),
                       float_table(call.norm),
                       weight_rows(call),
                       output_row_tensor(call.y),
                       partial.data<float>(),
                       call.M,
                       static_cast<int>(call.C),
                       static_cast<int>(call.K),
                       tiling.warps,
                       static_cast<int>(tiling.tiles)};
    const auto launch = tiling.columns == 64    ? launch_forward<T, 64, 1>
                        : tiling.columns == 128 ? launch_forward<T, 128, 1>
                                                : launch_forward<T, 96, 2>;
    if (call.M > 0 && call.K > 0) launch(launcher, args, tiling.blocks);
    launch_finish<&norm_relu_conv1x1_forward_finish_kernel>(launcher, partial.data<const float>(),
                                                            tiling.blocks, call.K, call.stats);
  });
}

}  // namespace
}  // namespace densenet_efficient

DE_REGISTER(library) {
  library.impl("norm_relu_conv1x1_forward",
               TORCH_BOX(&densenet_efficient::norm_relu_conv1x1_forward));
}
