// norm_relu_conv1x1, forward: y [M, K] = relu(a * x + s) @ weight^T, and the moments of y as
// stored.
//
// Tile: 32 rows a warp, four warps, all K columns (in steps of 64, 128 or 192; more than 192 in
// several columns of the grid), so that each element of x is normalised once, in the registers that
// feed the tensor cores. For 192 columns, and where there are few rows, two or four warps share
// their rows, and each normalises them (tiling/conv1x1.h).
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

using Tiling = tiling::NormReluConv1x1Forward;

constexpr int kStages = 3;
constexpr int kWarps = Tiling::kWarps, kWarpRows = Tiling::kWarpRows, kThreads = 32 * kWarps;
constexpr int kStep = kThreads / 4;  // rows that a block's threads copy at a time

struct Forward {
  device::RowTensor x;       // [M, C]
  device::Table norm;        // [5, C]
  device::RowTensor weight;  // [K, C]
  device::RowTensor y;       // [M, K]
  float* partial;            // [blocks, 3, K]: count, mean, M2; null without stats
  int64_t rows;              // M
  int channels;              // C
  int outputs;               // K
  int tiles;
};

// kColumns of y per warp, kSplit warps side by side.
template <typename T, int kColumns, int kSplit>
struct ForwardLayout {
  static constexpr int kTileRows = kWarps / kSplit * kWarpRows;
  static constexpr int kWeightOffset = kTileRows * device::kPanelRowBytes;
  static constexpr int kNormOffset = kWeightOffset + kColumns * kSplit * device::kPanelRowBytes;
  static constexpr int kStageBytes = kNormOffset + device::kScaleShiftBytes<T>;
  static constexpr int kStagingOffset = kStages * kStageBytes;
  static constexpr int kMomentsOffset = kStagingOffset + kWarps * device::kStagingBytes;
  static constexpr int kSharedBytes =
      kMomentsOffset + kWarps * device::BlockMoments<kColumns>::kWarpBytes;
};

// A thread's chunk of every kStep-th row of the panels of x and the weight, ahead of the product:
// where the next ones begin. Whole panels are copied by running addresses; what the end of the
// rows, outputs or channels cuts, and rows not aligned to 16 bytes, by copy_rows.
template <typename T, int kColumns, int kSplit>
struct Loader {
  using Layout = ForwardLayout<T, kColumns, kSplit>;
  static constexpr int kTileRows = Layout::kTileRows, kWeightRows = kColumns * kSplit;
  const Forward& args;
  const int column0, panels, last_tile;
  const bool aligned;
  const int thread, to;  // to: the thread's chunk of a panel; in registers, see device::kept
  int tile, panel = 0;
  const unsigned char *x, *weight;

  __device__ __forceinline__ Loader(const Forward& args, int column0, int panels, int first_tile,
                                    int last_tile)
      : args(args),
        column0(column0),
        panels(panels),
        last_tile(last_tile),
        aligned(min(args.x.vector, args.weight.vector) == device::kChunk<T> &&
                column0 + kWeightRows <= args.outputs),
        thread(device::kept(device::thread_index())),
        to(device::kept(device::panel_offset<T>(thread >> 2, thread & 3))),
        tile(first_tile) {
    using namespace device;
    const int row = thread >> 2, channel = (thread & 3) * kChunk<T>;
    x = reinterpret_cast<const unsigned char*>(
        args.x.at<T>(int64_t(first_tile) * kTileRows + row, channel));
    weight = reinterpret_cast<const unsigned char*>(args.weight.at<T>(column0 + row, channel));
  }

  // The next panel, to the stage's place.
  __device__ __forceinline__ void load(unsigned char* stage) {
    using namespace device;
    if (tile < last_tile) {
      const int channel = panel * kPanelChannels<T>;
      const int pitch = static_cast<int>(args.x.stride) * static_cast<int>(sizeof(T));
      const int weight_pitch = static_cast<int>(args.weight.stride) * static_cast<int>(sizeof(T));
      const int64_t row0 = int64_t(tile) * kTileRows;
      if (aligned && channel + kPanelChannels<T> <= args.channels &&
          row0 + kTileRows <= args.rows) {
#pragma unroll
        for (int row = 0; row < kTileRows; row += kStep)
          cp_async<16>(stage + to + row * kPanelRowBytes, x + int64_t(row) * pitch);
#pragma unroll
        for (int row = 0; row < kWeightRows; row += kStep)
          cp_async<16>(stage + to + Layout::kWeightOffset + row * kPanelRowBytes,
                       weight + int64_t(row) * weight_pitch);
      } else {
        const int rows = static_cast<int>(min(args.rows - row0, int64_t(kTileRows)));
        copy_rows<T>(stage, args.x, {0, row0, 0, rows, kTileRows, channel, args.channels},
                     kThreads);
        copy_rows<T>(stage + Layout::kWeightOffset, args.weight,
                     {0, column0, 0, min(args.outputs - column0, kWeightRows), kWeightRows, channel,
                      args.channels},
                     kThreads);
      }
      copy_scale_shift<T>(stage + Layout::kNormOffset, args.norm, channel, args.channels, thread,
                          kThreads);
      x += kPanelRowBytes;
      weight += kPanelRowBytes;
      if (++panel == panels) {
        x = advance(x, kTileRows, pitch) - panels * kPanelRowBytes;
        weight -= panels * kPanelRowBytes;
        panel = 0;
        ++tile;
      }
    }
    cp_async_commit();
  }
};

// Where a lane finds its operands in a stage: those of the panel's first half of channels. The
// second half's are the same, exclusive or 32 (for the norm: those of kDepth channels later).
template <typename T>
struct OperandPlaces {
  int x, weight, channel;  // in registers, see device::kept

  __device__ __forceinline__ OperandPlaces(int x_rows, int weight_rows) {
    using namespace device;
    const int lane = lane_index();
    x = kept(x_rows + panel_offset<T>(a_row(lane), a_chunk(lane)));
    weight = kept(weight_rows + panel_offset<T>(b_row(lane), b_chunk(lane)));
    channel = kept(kOperandChannels<T> * (lane & 3));
  }
};

// Two 8-column tiles at a time: one depth of a 32-row warp tile.
template <typename T, int kTiles>
__device__ __forceinline__ void multiply_step(float (&acc)[2][kTiles][4],
                                              const unsigned char* stage, int norm_offset,
                                              const OperandPlaces<T>& places, int step) {
  using namespace device;
  const unsigned char* const norm = stage + norm_offset;
  const int channel = kDepth<T> * step + places.channel;
  const OperandNorm<T> norm_low = load_operand_norm<T>(norm, channel);
  const OperandNorm<T> norm_high = load_operand_norm<T>(norm, channel + kDepth<T> / 2);
  // Eight rows further on, the order of the chunks is the same.
  const unsigned char* const x = stage + (places.x ^ (32 * step));
  const unsigned char* const weight = stage + (places.weight ^ (32 * step));
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
__global__ void __launch_bounds__(kThreads, Tiling::resident(kColumns))
    norm_relu_conv1x1_forward_kernel(Forward args) {
  using namespace device;
  using Layout = ForwardLayout<T, kColumns, kSplit>;
  constexpr int kTiles = kColumns / 8;
  const int warp = warp_index();
  const int warp_row = warp / kSplit * kWarpRows, warp_column = warp % kSplit * kColumns;
  const int column0 = block_y() * kColumns * kSplit;
  const int panels = max(1, panels_of<T>(args.channels));
  const int first_tile = static_cast<int>(int64_t(args.tiles) * block_x() / grid_x());
  const int last_tile = static_cast<int>(int64_t(args.tiles) * (block_x() + 1) / grid_x());
  unsigned char* shared = shared_memory();

  const BlockMoments<kColumns> block_moments(shared + Layout::kMomentsOffset);
  WarpMoments moments = block_moments.start(warp);

  const OperandPlaces<T> places(warp_row * kPanelRowBytes,
                                Layout::kWeightOffset + warp_column * kPanelRowBytes);
  // The panel that is loaded next is kStages - 1 ahead of the one that is multiplied.
  Loader<T, kColumns, kSplit> loader(args, column0, panels, first_tile, last_tile);
  for (int stage = 0; stage < kStages - 1; ++stage)
    loader.load(shared + stage * Layout::kStageBytes);

  int stage = 0;
  for (int tile = first_tile; tile < last_tile; ++tile) {
    float acc[2][kTiles][4] = {};
    for (int panel = 0; panel < panels; ++panel) {
      cp_async_wait<kStages - 2>();
      sync_threads();
      loader.load(shared + (stage == 0 ? kStages - 1 : stage - 1) * Layout::kStageBytes);
      const unsigned char* from = shared + stage * Layout::kStageBytes;
#pragma unroll
      for (int step = 0; step < 2; ++step)
        multiply_step<T, kTiles>(acc, from, Layout::kNormOffset, places, step);
      stage = stage == kStages - 1 ? 0 : stage + 1;
    }
    const int64_t row0 = int64_t(tile) * Layout::kTileRows + warp_row;
    const int rows = static_cast<int>(min(args.rows - row0, int64_t(kWarpRows)));
    const int column = column0 + warp_column;
    const int end = column + kColumns < args.outputs ? column + kColumns : args.outputs;
    write_rows<T, kTiles>(acc, shared + Layout::kStagingOffset + warp * kStagingBytes, args.y, row0,
                          column, end, args.partial != nullptr, moments,
                          [&](int r) { return r < rows ? r : -1; });
  }
  if (args.partial)
    block_moments.template finish<kSplit>(moments, kWarps,
                                          args.partial + int64_t(block_x()) * 3 * args.outputs,
                                          column0, args.outputs);
}

__global__ void __launch_bounds__(kMomentThreads)
    norm_relu_conv1x1_forward_finish_kernel(MomentPartials<float> args) {
  finish_moments(args);
}

// ---- Launcher -----------------------------------------------------------------------------------

template <typename T, int kColumns, int kSplit>
void launch_forward(const Launcher& launcher, const Forward& args, int64_t blocks) {
  launcher.launch<&norm_relu_conv1x1_forward_kernel<T, kColumns, kSplit>>(
      {.grid_x = blocks,
       .grid_y = ceil_div(args.outputs, kColumns * kSplit),
       .block = kThreads,
       .shared_bytes = ForwardLayout<T, kColumns, kSplit>::kSharedBytes,
       .tiles = args.tiles,
       .ranges = blocks},
      args);
}

void norm_relu_conv1x1_forward(Tensor x, Tensor norm, Tensor weight, Tensor y, OptionalTensor stats,
                               OptionalTensor next_stats, OptionalTensor next_gamma,
                               OptionalTensor next_beta, double next_eps,
                               OptionalTensor next_norm) {
  const arguments::NormReluConv1x1Forward call(
      x, norm, weight, y, stats, {next_stats, next_gamma, next_beta, next_eps, next_norm});
  dispatch_operands(call.lead, [&]<typename T>(T) {
    const Launcher launcher(call.lead);
    const Tiling tiling(call.M, call.K, stats.has_value(), launcher.device());
    const Workspace partial(x, tiling.bytes);
    const Forward args{
        row_tensor(call.x),        float_table(call.norm),   weight_rows(call),
        output_row_tensor(call.y), partial.data<float>(),    call.M,
        static_cast<int>(call.C),  static_cast<int>(call.K), static_cast<int>(tiling.tiles)};
    const auto launch = tiling.columns == 128  ? launch_forward<T, 128, 1>
                        : tiling.columns == 96 ? launch_forward<T, 96, 2>
                        : tiling.columns == 48 ? launch_forward<T, 48, 4>
                        : tiling.columns == 16 ? launch_forward<T, 16, 4>
                        : tiling.columns == 32 ? tiling.split == 4 ? launch_forward<T, 32, 4>
                                                                   : launch_forward<T, 32, 2>
                        : tiling.split == 2    ? launch_forward<T, 64, 2>
                                               : launch_forward<T, 64, 1>;
    if (call.M > 0 && call.K > 0) launch(launcher, args, tiling.blocks);
    launch_finish<&norm_relu_conv1x1_forward_finish_kernel>(
        launcher, partial.data<const float>(), tiling.blocks, call.K, call.stats, call.next);
  });
}

}  // namespace
}  // namespace densenet_efficient

DE_REGISTER(library) {
  library.impl("norm_relu_conv1x1_forward",
               TORCH_BOX(&densenet_efficient::norm_relu_conv1x1_forward));
}
