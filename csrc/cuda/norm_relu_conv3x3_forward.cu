// norm_relu_conv3x3, forward: y [N, H, W, K] = conv3x3(relu(a * x + s), weight), padding 1, stride
// 1, and the moments of y as stored.
//
// Tile: rows of pixels of the images, 64 pixels a warp (conv3x3/halo.cuh), all K columns (in steps
// of 16, 32 or 48; more than 48 in several columns of the grid). The halo of a tile is loaded for
// 32 channels at a time, normalised once in place, and multiplied nine times at shifted positions;
// the accumulators stay in registers over all channels.
// Who owns what: a block walks over a static range of tiles and, within a tile, over the panels of
// 32 channels; (tile, panel) pairs form one sequence, of which cp.async loads the next while this
// one is multiplied. A warp writes its pixels and takes their moments as in the 1x1 convolution.
// Bytes: x times the halo's share (positions / pixels; from the L2 cache but once), y once (2 M K),
// the weight once per tile (2 * 9 K C, from the L2 cache).
// Sums: fp32 accumulators over taps and channels; moments exact per 16 pixels, merged in a fixed
// order. C tail: x and weight arrive as zeros, and so do scale and shift.
#include "conv3x3/halo.cuh"
#include "conv3x3/pack_weight.cuh"
#include "gemm/epilogue.cuh"
#include "reduce/finish.cuh"

namespace densenet_efficient {
namespace {

using Tile = tiling::Tile3x3;
using Layout = tiling::ForwardLayout3x3;
using Tiling = tiling::NormReluConv3x3Forward;

constexpr int kStages = Layout::kStages;

struct Forward {
  device::RowTensor x;       // [N * H * W, C]
  device::Table norm;        // [5, C]
  device::RowTensor weight;  // [9 K, C]
  device::RowTensor y;       // [N * H * W, K]
  float* partial;            // [blocks, 3, K]: count, mean, M2; null without stats
  int channels;              // C
  int outputs;               // K
};

// The nine shifted products of 64 pixels with one panel of channels; the weight lies at a multiple
// of kZeroBytes.
template <typename T, int kTiles>
__device__ __forceinline__ void multiply_panel(float (&acc)[4][kTiles][4],
                                               const unsigned char* shared, int weight, int zeros,
                                               device::OperandRows rows, int pitch) {
  using namespace device;
  const int lane = lane_index();
  int of_row = weight + b_row(lane) * kTaps * kPanelRowBytes + 16 * b_chunk(lane);
  rows.offset -= (pitch + 1) * kPanelRowBytes;
#pragma unroll 1
  for (int dh = 0; dh < 3; ++dh) {
#pragma unroll
    for (int dw = 0; dw < 3; ++dw) {
      const int of_weight = swizzle_chunks<T>(of_row + dw * kPanelRowBytes);
      int offsets[4];
      tap_offsets<T>(offsets, rows, 1u << dw, dw, zeros);
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        uint32_t a[4][4];
#pragma unroll
        for (int m = 0; m < 4; ++m)
          ldmatrix_x4(a[m], shared + (offsets[m] ^ (32 * step)) + 16 * m * kPanelRowBytes);
#pragma unroll
        for (int j = 0; j < kTiles; j += 2) {
          uint32_t b[4];
          ldmatrix_x4(b, shared + 8 * j * kTaps * kPanelRowBytes + (of_weight ^ (32 * step)));
          round_operands<T>(b);
#pragma unroll
          for (int m = 0; m < 4; ++m) multiply_add_pair<T>(acc[m][j], acc[m][j + 1], a[m], b);
        }
      }
    }
    of_row += 3 * kPanelRowBytes;
    rows.next_taps(pitch);
  }
}

template <typename T, int kColumns>
__global__ void __launch_bounds__(32 * Tile::kMaxGroups, kColumns < 48 ? 2 : 1)
    norm_relu_conv3x3_forward_kernel(Forward args, Images images) {
  using namespace device;
  constexpr int kTiles = kColumns / 8;
  const Layout layout{sizeof(T), kColumns, images.positions, images.groups};
  const int threads = 32 * images.groups, warp = warp_index(), lane = lane_index();
  const int column0 = block_y() * kColumns;
  const int panels = max(1, panels_of<T>(args.channels));
  const int first_tile = images.first_tile(block_x(), grid_x());
  const int last_tile = images.first_tile(block_x() + 1, grid_x());
  unsigned char* shared = shared_memory();
  unsigned char* pixels = shared + layout.pixels_offset();

  clear_zeros(shared + layout.zero_offset(), kGroupZeroBytes, threads);
  const BlockMoments<kColumns> block_moments(shared + layout.moments_offset());
  WarpMoments moments = block_moments.start(warp);
  sync_threads();

  int load_tile = first_tile;
  int load_panel = 0;
  const auto load = [&](int stage_index) {
    if (load_tile < last_tile) {
      unsigned char* stage = shared + stage_index * layout.stage_bytes();
      const int channel = load_panel * kPanelChannels<T>;
      copy_tile_rows<T>(stage, args.weight,
                        {0, kTaps * column0, 0, kTaps * (args.outputs - column0), kTaps * kColumns,
                         channel, args.channels},
                        threads);
      copy_scale_shift<T>(shared + layout.norm_offset(stage_index), args.norm, channel,
                          args.channels, thread_index(), threads);
      copy_halo<T>(stage + layout.halo_offset(), images, TileOrigin(images, load_tile), args.x,
                   channel, args.channels, threads);
      if (++load_panel == panels) {
        load_panel = 0;
        ++load_tile;
      }
    }
    cp_async_commit();
  };
  load(0);

  int stage_index = 0;
  for (int tile = first_tile; tile < last_tile; ++tile) {
    const TileOrigin origin(images, tile);
    float acc[4][kTiles][4] = {};
    for (int panel = 0; panel < panels; ++panel) {
      cp_async_wait<0>();
      sync_threads();
      load(1 - stage_index);
      const int weight = stage_index * layout.stage_bytes(), halo = weight + layout.halo_offset();
      normalise_panel<T>(shared + halo, shared + layout.norm_offset(stage_index), images.positions,
                         threads);
      if (panel == 0) describe_tile(images, origin, pixels, threads);
      sync_threads();
      multiply_panel<T, kTiles>(acc, shared, weight, layout.zero_offset(),
                                operand_rows(pixels, warp * Tile::kGroup + a_row(lane),
                                             16 * a_chunk(lane), halo, images.pitch),
                                images.pitch);
      stage_index = 1 - stage_index;
    }
    const int end = column0 + kColumns < args.outputs ? column0 + kColumns : args.outputs;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const unsigned char* rows = pixels + (warp * Tile::kGroup + 32 * half) * kPixelBytes;
      write_rows<T, kTiles>(
          acc + 2 * half, shared + layout.staging_offset() + warp * kStagingBytes, args.y,
          origin.pixel(images), column0, end, args.partial != nullptr, moments,
          [&](int r) { return static_cast<int>(shared_load<uint2>(rows + r * kPixelBytes).x); });
    }
  }
  if (args.partial)
    block_moments.template finish<1>(moments, images.groups,
                                     args.partial + int64_t(block_x()) * 3 * args.outputs, column0,
                                     args.outputs);
}

template <typename T>
__global__ void __launch_bounds__(kPackThreads)
    norm_relu_conv3x3_forward_pack_kernel(PackWeight<T> args) {
  pack_weight(args);
}

__global__ void __launch_bounds__(kMomentThreads)
    norm_relu_conv3x3_forward_finish_kernel(MomentPartials<float> args) {
  finish_moments(args);
}

// ---- Launcher -----------------------------------------------------------------------------------

template <typename T, int kColumns>
void launch_forward(const Launcher& launcher, const LaunchShape& shape, const Forward& args,
                    const Images& images) {
  launcher.launch<&norm_relu_conv3x3_forward_kernel<T, kColumns>>(shape, args, images);
}

void norm_relu_conv3x3_forward(Tensor x, Tensor norm, Tensor weight, Tensor y, OptionalTensor stats,
                               OptionalTensor next_stats, OptionalTensor next_gamma,
                               OptionalTensor next_beta, double next_eps,
                               OptionalTensor next_norm) {
  const arguments::NormReluConv3x3Forward call(
      x, norm, weight, y, stats, {next_stats, next_gamma, next_beta, next_eps, next_norm});
  check_two_dimensional(call);
  dispatch_operands(call.lead, [&]<typename T>(T) {
    if (call.K == 0) return;
    const Launcher launcher(call.lead);
    const tiling::Images3x3 of{call.N, call.H, call.W};
    const Tiling tiling(of, call.C, call.K, sizeof(T), needs_packing(weight), stats.has_value(),
                        launcher.device());
    check_fits(call.lead, tiling.tile);
    check_near(call.lead.op, {call.x});
    const Workspace packed(x, tiling.weight_bytes), partial(x, tiling.moment_bytes);
    const Forward args{
        row_tensor(call.x),
        float_table(call.norm),
        packed_rows<&norm_relu_conv3x3_forward_pack_kernel<T>, T>(launcher, weight, packed),
        output_row_tensor(call.y),
        partial.data<float>(),
        static_cast<int>(call.C),
        static_cast<int>(call.K)};
    const auto launch = tiling.columns == 16   ? launch_forward<T, 16>
                        : tiling.columns == 32 ? launch_forward<T, 32>
                                               : launch_forward<T, 48>;
    if (tiling.tile.blocks > 0)
      launch(launcher,
             {.grid_x = tiling.tile.blocks,
              .grid_y = ceil_div(call.K, tiling.columns),
              .block = 32 * tiling.tile.groups,
              .shared_bytes = tiling.tile.shared_bytes,
              .tiles = tiling.tile.tiles,
              .ranges = tiling.tile.blocks},
             args, Images(tiling.tile, of));
    launch_finish<&norm_relu_conv3x3_forward_finish_kernel>(
        launcher, partial.data<const float>(), tiling.tile.blocks, call.K, call.stats, call.next);
  });
}

}  // namespace
}  // namespace densenet_efficient

DE_REGISTER(library) {
  library.impl("norm_relu_conv3x3_forward",
               TORCH_BOX(&densenet_efficient::norm_relu_conv3x3_forward));
}
