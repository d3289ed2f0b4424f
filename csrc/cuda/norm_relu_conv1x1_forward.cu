// norm_relu_conv1x1, forward: y [M, K] = relu(a * x + s) @ weight^T, and the moments of y as
// stored.
//
// Tile: 32 rows a warp, four warps, all K columns (in steps of 64, 128 or 192; more than 192 in
// several columns of the grid), so that each element of x is normalised once, in the registers that
// feed the tensor cores. For 192 columns, and where there are fewer rows, two warps share their
// rows, and each normalises them. Where there are few rows conv1x1/narrow_forward.cuh takes over,
// with smaller tiles whose depth the warps divide (tiling/conv1x1.h).
// Who owns what: a block walks over a static range of row tiles and, within a tile, over the
// channels in panels of 32; (tile, panel) pairs form one sequence that cp.async runs ahead of, so
// that the loads of the next tile are under way while this one is written. A warp rounds its rows
// into 2 KB of its own, from where they leave in 16-byte stores and enter the warp's running
// moments. Bytes: x once (2 M C), y once (2 M K), the weight once per tile (2 K C, from the L2
// cache). Sums: fp32 accumulators over C; moments exact two-pass over 16 rows, then merged in a
// fixed order: rows of a warp, warps of a block, blocks (second pass, from 12 K bytes a block).
// C tail: x and weight arrive as zeros, and so do scale and shift: relu(0 * 0 + 0) = 0.
#include "conv1x1/narrow_forward.cuh"
#include "reduce/finish.cuh"
#include "workspace.h"

namespace densenet_efficient {
namespace {

using namespace conv1x1_forward;

constexpr int kWarps = Tiling::kWarps, kWarpRows = Tiling::kWarpRows, kThreads = 32 * kWarps;
constexpr int kStep = kThreads / 4;  // rows that a block's threads copy at a time

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
  const int column0, panels, last_tile, whole_tiles;
  const bool aligned, whole_weight;
  const int thread, to;  // to: the thread's chunk of a panel; in registers, see device::kept
  const ScaleShiftCopy<T, kThreads> scale_shift;
  int tile, panel = 0;
  const unsigned char *x, *weight;

  __device__ __forceinline__ Loader(const Forward& args, int column0, int panels, int first_tile,
                                    int last_tile)
      : args(args),
        column0(column0),
        panels(panels),
        last_tile(last_tile),
        whole_tiles(static_cast<int>(args.rows / kTileRows)),
        aligned(args.x.vector == device::kChunk<T> &&
                args.weight.vector >= device::kOperandChannels<T>),
        whole_weight(args.weight.vector == device::kChunk<T> &&
                     column0 + kWeightRows <= args.outputs),
        thread(device::kept(device::thread_index())),
        to(device::kept(device::panel_offset<T>(thread >> 2, thread & 3))),
        scale_shift(args.norm, thread),
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
      const int pitch = row_pitch<T>(args.x), weight_pitch = row_pitch<T>(args.weight);
      if (aligned && channel + kPanelChannels<T> <= args.channels && tile < whole_tiles) {
#pragma unroll
        for (int row = 0; row < kTileRows; row += kStep)
          cp_async<16>(stage + to + row * kPanelRowBytes, x + int64_t(row) * pitch);
        // Products with rows of the weight that do not exist are not stored.
        if (whole_weight) {
          copy_weight<16>(stage, kWeightRows, weight_pitch);
        } else {
          const int left = args.outputs - column0 - (thread >> 2);
          with_alignment<T>(args.weight, [&]<int kBytes>(std::integral_constant<int, kBytes>) {
            copy_weight<kBytes>(stage, left, weight_pitch);
          });
        }
        scale_shift.copy(stage + Layout::kNormOffset, args.norm, channel, thread);
      } else {
        const int64_t row0 = int64_t(tile) * kTileRows;
        const int rows = static_cast<int>(min(args.rows - row0, int64_t(kTileRows)));
        copy_rows<T>(stage, args.x, {0, row0, 0, rows, kTileRows, channel, args.channels},
                     kThreads);
        copy_rows<T>(stage + Layout::kWeightOffset, args.weight,
                     {0, column0, 0, min(args.outputs - column0, kWeightRows), kWeightRows, channel,
                      args.channels},
                     kThreads);
        copy_scale_shift<T>(stage + Layout::kNormOffset, args.norm, channel, args.channels, thread,
                            kThreads);
      }
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

  // Of the thread's rows of the weight those before `left`.
  template <int kBytes>
  __device__ __forceinline__ void copy_weight(unsigned char* stage, int left, int pitch) const {
#pragma unroll
    for (int row = 0; row < kWeightRows; row += kStep)
      if (row < left)
        copy_aligned<kBytes>(stage + to + Layout::kWeightOffset + row * device::kPanelRowBytes,
                             weight + int64_t(row) * pitch, to);
  }
};

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
        multiply_step<T, 2, kTiles>(acc, from, Layout::kNormOffset, places, step);
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

template <typename T, int kColumns, int kNarrowWarps, int kRowTiles>
void launch_narrow(const Launcher& launcher, const Forward& args, int64_t blocks) {
  launcher.launch<&norm_relu_conv1x1_forward_narrow_kernel<T, kColumns, kNarrowWarps, kRowTiles>>(
      {.grid_x = blocks,
       .grid_y = ceil_div(args.outputs, kColumns),
       .block = 32 * kNarrowWarps,
       .shared_bytes = NarrowLayout<T, kColumns, kNarrowWarps, kRowTiles>::kSharedBytes,
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
    const Tiling tiling(call.M, call.C, call.K, sizeof(T), stats.has_value(), launcher.device());
    const Workspace partial(x, tiling.bytes);
    const Forward args{
        row_tensor(call.x),        float_table(call.norm),   weight_rows(call),
        output_row_tensor(call.y), partial.data<float>(),    call.M,
        static_cast<int>(call.C),  static_cast<int>(call.K), static_cast<int>(tiling.tiles)};
    const auto wide = tiling.columns == 128  ? launch_forward<T, 128, 1>
                      : tiling.columns == 96 ? launch_forward<T, 96, 2>
                      : tiling.split == 2    ? launch_forward<T, 64, 2>
                                             : launch_forward<T, 64, 1>;
    const auto narrow = tiling.tile_rows == 32 ? launch_narrow<T, 64, 4, 2>
                        : tiling.columns == 64 ? launch_narrow<T, 64, 4, 1>
                        : tiling.columns == 48 ? launch_narrow<T, 48, 4, 1>
                        : tiling.warps == 4    ? launch_narrow<T, 32, 4, 1>
                                               : launch_narrow<T, 32, 8, 1>;
    const auto launch = tiling.narrow ? narrow : wide;
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
