// transition, forward: y [N, H/2, W/2, K] = avg_pool2x2(relu(a * x + s)) @ weight^T, and the
// moments of y as stored. The pooling comes before the product, which it commutes with: a
// quarter of the work. Odd edges are dropped.
//
// Tile: 32 pooled rows a warp, 128 columns; up to 64 columns all four warps are stacked along M
// and have 64, more than 128 make pairs of warps that share their rows; more than 256 take several
// columns of the grid. The four pixels of each row arrive in four panels of shared memory
// (gemm/panel.cuh); the mean of their normalised values takes the place of the first, rounded to an
// operand, and of the second, what the rounding left: two products, which next to four pixels'
// bytes cost no time, keep the digits that the mean of four rounded pixels would have.
// Who owns what: a block walks over a static range of row tiles and, within a tile, over the
// channels in panels, one panel ahead of the products.
// Bytes: the pool of x once per 256 columns (2 * 4 M C for M pooled rows), y once (2 M K), the
// weight once per tile (2 K C, from the L2 cache).
// Sums: fp32 accumulators over C; moments exact two-pass, merged in a fixed order
// (gemm/epilogue.cuh).
#include "gemm/epilogue.cuh"
#include "gemm/row_tensor.h"
#include "pool/windows.h"
#include "reduce/finish.cuh"
#include "tiling/pool.h"
#include "workspace.h"

namespace densenet_efficient {
namespace {

using Tiling = tiling::TransitionForward;

constexpr int kStages = 2;
constexpr int kWarps = Tiling::kWarps, kThreads = 32 * kWarps, kWarpRows = Tiling::kWarpRows;

struct Forward {
  device::RowTensor x;       // [N * H * W, C]
  device::Table norm;        // [5, C]
  device::RowTensor weight;  // [K, C]
  device::RowTensor y;       // [M, K]
  float* partial;            // [blocks, 3, K]: count, mean, M2; null without stats
  PoolWindows pool;          // M windows
  int channels;              // C
  int outputs;               // K
};

// kColumns of y per warp, kSplit warps side by side.
template <typename T, int kColumns, int kSplit>
struct Layout {
  static constexpr int kRows = kWarps / kSplit * kWarpRows;
  static constexpr int kPanelBytes = kRows * device::kPanelRowBytes;  // of one pixel of the pool
  static constexpr int kWeight = kWindowPixels * kPanelBytes;
  static constexpr int kNorm = kWeight + kColumns * kSplit * device::kPanelRowBytes;
  static constexpr int kStageBytes = kNorm + device::kScaleShiftBytes<T>;
  static constexpr int kStaging = kStages * kStageBytes;
  static constexpr int kMoments = kStaging + kWarps * device::kStagingBytes;
  static constexpr int kBytes = kMoments + kWarps * device::BlockMoments<kColumns>::kWarpBytes;
};

// The mean of four pixels' normalised words: an operand, and in `residual` what its rounding left.
template <typename T>
__device__ __forceinline__ uint32_t pool_operand(const uint32_t (&pixels)[kWindowPixels],
                                                 device::OperandNorm<T> norm, uint32_t& residual) {
  constexpr int kWidth = device::kOperandChannels<T>;
  float values[kWindowPixels][kWidth], mean[kWidth], rounded[kWidth];
#pragma unroll
  for (int pixel = 0; pixel < kWindowPixels; ++pixel)
    device::unpack_operand<T>(pixels[pixel], values[pixel]);
#pragma unroll
  for (int k = 0; k < kWidth; ++k) {
    const float2 own = device::channel_norm<T>(norm, k);
    const float top = norm_relu(values[0][k], own.x, own.y) + norm_relu(values[1][k], own.x, own.y);
    const float bottom =
        norm_relu(values[2][k], own.x, own.y) + norm_relu(values[3][k], own.x, own.y);
    mean[k] = 0.25f * (top + bottom);
  }
  const uint32_t word = device::to_operand<T>(mean);
  device::unpack_operand<T>(word, rounded);
#pragma unroll
  for (int k = 0; k < kWidth; ++k) mean[k] = device::residual_of(mean[k], rounded[k]);
  residual = device::to_operand<T>(mean);
  return word;
}

// Pools a panel of each of the four pixels into the first two pixels' places: a thread takes chunk
// thread % 4 of every 32nd row.
template <typename T>
__device__ __forceinline__ void pool_panels(unsigned char* panels, int panel_bytes, int rows,
                                            const unsigned char* norm) {
  using namespace device;
  const int chunk = thread_index() & 3;
  for (int row = thread_index() >> 2; row < rows; row += kThreads / 4) {
    unsigned char* const at = panels + panel_offset<T>(row, chunk);
    uint32_t words[kWindowPixels][4], mean[4], residual[4];
#pragma unroll
    for (int pixel = 0; pixel < kWindowPixels; ++pixel)
      to_array(shared_load<uint4>(at + pixel * panel_bytes), words[pixel]);
#pragma unroll
    for (int i = 0; i < 4; ++i)
      mean[i] = pool_operand<T>(
          {words[0][i], words[1][i], words[2][i], words[3][i]},
          load_operand_norm<T>(norm, chunk * kChunk<T> + i * kOperandChannels<T>), residual[i]);
    shared_store(at, uint4{mean[0], mean[1], mean[2], mean[3]});
    shared_store(at + panel_bytes, uint4{residual[0], residual[1], residual[2], residual[3]});
  }
}

// One depth of a 32-row warp tile: the pooled operands, and `residual` bytes after them
// what rounding left.
template <typename T, int kTiles>
__device__ __forceinline__ void multiply_step(float (&acc)[2][kTiles][4],
                                              const unsigned char* pooled, int residual,
                                              const unsigned char* weight, int step) {
  using namespace device;
  const int lane = lane_index();
  const int offset = panel_offset<T>(a_row(lane), a_chunk(lane)) ^ (32 * step);
  uint32_t a[2][2][4];
#pragma unroll
  for (int part = 0; part < 2; ++part) {
#pragma unroll
    for (int m = 0; m < 2; ++m)
      ldmatrix_x4(a[part][m], pooled + part * residual + 16 * m * kPanelRowBytes + offset);
  }
#pragma unroll
  for (int j = 0; j < kTiles; j += 2) {
    uint32_t b[4];
    ldmatrix_x4(b, weight + panel_offset<T>(8 * j + b_row(lane), 2 * step + b_chunk(lane)));
    round_operands<T>(b);
#pragma unroll
    for (int part = 0; part < 2; ++part) {
#pragma unroll
      for (int m = 0; m < 2; ++m) multiply_add_pair<T>(acc[m][j], acc[m][j + 1], a[part][m], b);
    }
  }
}

template <typename T, int kColumns, int kSplit>
__global__ void __launch_bounds__(kThreads, 2) transition_forward_kernel(Forward args) {
  using namespace device;
  using Layout = Layout<T, kColumns, kSplit>;
  constexpr int kTiles = kColumns / 8, kLoadStep = kThreads / 4, kLoads = Layout::kRows / kLoadStep;
  const int warp = warp_index(), thread = thread_index();
  const int warp_row = warp / kSplit * kWarpRows, warp_column = warp % kSplit * kColumns;
  const int column0 = block_y() * kColumns * kSplit;
  const int rows = args.pool.windows;
  const int panels = max(1, panels_of<T>(args.channels));
  const int64_t tiles = (rows + Layout::kRows - 1) / Layout::kRows;
  const int first_tile = static_cast<int>(tiles * block_x() / grid_x());
  const int last_tile = static_cast<int>(tiles * (block_x() + 1) / grid_x());
  unsigned char* const shared = shared_memory();

  const BlockMoments<kColumns> block_moments(shared + Layout::kMoments);
  WarpMoments moments = block_moments.start(warp);

  // The panel that is loaded next, one ahead of the one that is multiplied.
  int load_tile = first_tile, load_panel = 0;
  const int load_row = thread >> 2, load_chunk = thread & 3;
  int corners[kLoads];  // of the rows that this thread loads
  const auto load = [&](int stage) {
    if (load_tile < last_tile) {
      const int row0 = load_tile * Layout::kRows + load_row;
      if (load_panel == 0) {
#pragma unroll
        for (int i = 0; i < kLoads; ++i)
          corners[i] = row0 + i * kLoadStep < rows ? args.pool.corner(row0 + i * kLoadStep) : -1;
      }
      unsigned char* const to = shared + stage * Layout::kStageBytes;
      const int channel = load_panel * kPanelChannels<T> + load_chunk * kChunk<T>;
      const int left = args.channels - channel;
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
#pragma unroll
        for (int pixel = 0; pixel < kWindowPixels; ++pixel) {
          const bool exists = corners[i] >= 0;
          copy_chunk(to + pixel * Layout::kPanelBytes +
                         panel_offset<T>(load_row + i * kLoadStep, load_chunk),
                     args.x.at<T>(exists ? corners[i] + args.pool.offset(pixel) : 0, channel),
                     exists ? left : 0, args.x.vector);
        }
      }
      for (int row = load_row; row < kColumns * kSplit; row += kLoadStep) {
        const bool exists = column0 + row < args.outputs;
        copy_chunk(to + Layout::kWeight + panel_offset<T>(row, load_chunk),
                   args.weight.at<T>(exists ? column0 + row : 0, channel), exists ? left : 0,
                   args.weight.vector);
      }
      copy_scale_shift<T>(to + Layout::kNorm, args.norm, load_panel * kPanelChannels<T>,
                          args.channels, thread_index(), kThreads);
      if (++load_panel == panels) {
        load_panel = 0;
        ++load_tile;
      }
    }
    cp_async_commit();
  };
  load(0);

  int stage = 0;
  for (int tile = first_tile; tile < last_tile; ++tile) {
    float acc[2][kTiles][4] = {};
    for (int panel = 0; panel < panels; ++panel) {
      cp_async_wait<0>();
      sync_threads();
      load(1 - stage);
      unsigned char* const from = shared + stage * Layout::kStageBytes;
      pool_panels<T>(from, Layout::kPanelBytes, Layout::kRows, from + Layout::kNorm);
      sync_threads();
#pragma unroll
      for (int step = 0; step < 2; ++step)
        multiply_step<T, kTiles>(acc, from + warp_row * kPanelRowBytes, Layout::kPanelBytes,
                                 from + Layout::kWeight + warp_column * kPanelRowBytes, step);
      stage = 1 - stage;
    }
    const int row0 = tile * Layout::kRows + warp_row, column = column0 + warp_column;
    write_rows<T, kTiles>(acc, shared + Layout::kStaging + warp * kStagingBytes, args.y, row0,
                          column, min(column + kColumns, args.outputs), args.partial != nullptr,
                          moments, [&](int r) { return row0 + r < rows ? r : -1; });
  }
  if (args.partial)
    block_moments.template finish<kSplit>(moments, kWarps,
                                          args.partial + int64_t(block_x()) * 3 * args.outputs,
                                          column0, args.outputs);
}

__global__ void __launch_bounds__(kMomentThreads)
    transition_forward_finish_kernel(MomentPartials<float> args) {
  finish_moments(args);
}

// ---- Launcher -----------------------------------------------------------------------------------

template <typename T, int kColumns, int kSplit>
void launch_forward(const Launcher& launcher, const Forward& args, const Tiling& tiling) {
  launcher.launch<&transition_forward_kernel<T, kColumns, kSplit>>(
      {.grid_x = tiling.blocks,
       .grid_y = ceil_div(args.outputs, kColumns * kSplit),
       .block = kThreads,
       .shared_bytes = Layout<T, kColumns, kSplit>::kBytes},
      args);
}

void transition_forward(Tensor x, Tensor norm, Tensor weight, Tensor y, OptionalTensor stats) {
  const arguments::TransitionForward call(x, norm, weight, y, stats);
  check_two_dimensional(call);
  dispatch_operands(call.lead, [&]<typename T>(T) {
    const PoolWindows pool(call, true);
    const Launcher launcher(call.lead);
    const Tiling tiling(pool.windows, call.K, stats.has_value(), launcher.device());
    const Workspace partial(x, tiling.bytes);
    const Forward args{row_tensor(call.x),        float_table(call.norm),  weight_rows(call),
                       output_row_tensor(call.y), partial.data<float>(),   pool,
                       static_cast<int>(call.C),  static_cast<int>(call.K)};
    const auto launch = tiling.columns == 64 ? launch_forward<T, 64, 1>
                        : tiling.split == 1  ? launch_forward<T, 128, 1>
                                             : launch_forward<T, 128, 2>;
    if (pool.windows > 0 && call.K > 0) launch(launcher, args, tiling);
    launch_finish<&transition_forward_finish_kernel>(launcher, partial.data<const float>(),
                                                     tiling.blocks, call.K, call.stats);
  });
}

}  // namespace
}  // namespace densenet_efficient

DE_REGISTER(library) {
  library.impl("transition_forward", TORCH_BOX(&densenet_efficient::transition_forward));
}
