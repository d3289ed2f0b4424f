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
#include "conv3x3/copies.cuh"
#include "conv3x3/pack_weight.cuh"
#include "gemm/epilogue.cuh"
#include "reduce/finish.cuh"

namespace densenet_efficient {
namespace {

using Tile = tiling::Tile3x3;
using Layout = tiling::ForwardLayout3x3;
using Tiling = tiling::NormReluConv3x3Forward;

constexpr int kStages = Layout::kStages;
using tiling::kTapRows;
constexpr int kSharedThreads = 384;

struct Forward {
  device::RowTensor x;       // [N * H * W, C]
  device::Table norm;        // [5, C]
  device::RowTensor weight;  // [9 K, C]
  device::RowTensor y;       // [N * H * W, K]
  float* partial;            // [blocks, 3, K]: count, mean, M2; null without stats
  int channels;              // C
  int outputs;               // K
  Eights weight_eights;      // of a panel's rows
  bool usual;                // x and weight have usual rows
};

// The shifted products of 16 kRows pixels with one panel of channels, of kTapRows rows of taps from
// `first` on, and of both halves of its depth or the one at `byte` of its rows; the weight lies at
// a multiple of kZeroBytes.
template <typename T, int kTapRows, int kRows, int kTiles>
__device__ __forceinline__ void multiply_panel(float (&acc)[kRows][kTiles][4],
                                               const unsigned char* shared, int weight, int zeros,
                                               device::OperandRows<kRows> rows, int pitch,
                                               int first, int byte, bool both) {
  using namespace device;
  const int lane = lane_index();
  int of_row = weight + b_row(lane) * kTaps * kPanelRowBytes + 16 * b_chunk(lane) + byte;
  rows.offset += byte - (pitch + 1) * kPanelRowBytes;
  of_row += 3 * first * kPanelRowBytes;
  rows.skip_taps(first, pitch);
#pragma unroll 1
  for (int dh = 0; dh < kTapRows; ++dh) {
#pragma unroll
    for (int dw = 0; dw < 3; ++dw) {
      const int of_weight = swizzle_chunks<T>(of_row + dw * kPanelRowBytes);
      int offsets[kRows];
      tap_offsets<T>(offsets, rows, 1u << dw, dw, zeros);
      const auto multiply = [&](int step) {
        uint32_t a[kRows][4];
#pragma unroll
        for (int m = 0; m < kRows; ++m)
          ldmatrix_x4(a[m], shared + (offsets[m] ^ (32 * step)) + 16 * m * kPanelRowBytes);
#pragma unroll
        for (int j = 0; j < kTiles; j += 2) {
          uint32_t b[4];
          ldmatrix_x4(b, shared + 8 * j * kTaps * kPanelRowBytes + (of_weight ^ (32 * step)));
          round_operands<T>(b);
#pragma unroll
          for (int m = 0; m < kRows; ++m) multiply_add_pair<T>(acc[m][j], acc[m][j + 1], a[m], b);
        }
      };
      multiply(0);
      if (both) multiply(1);
    }
    of_row += 3 * kPanelRowBytes;
    rows.skip_taps(1, pitch);
  }
}

// A warp's accumulators to where the sums of its group's other warps meet, and added to those of
// the warp that writes: `sums` of one warp.
template <int kTiles>
__device__ __forceinline__ void give_sums(const float (&acc)[2][kTiles][4], unsigned char* sums) {
  float4* const to = reinterpret_cast<float4*>(sums) + device::lane_index();
#pragma unroll
  for (int i = 0; i < 2 * kTiles; ++i) {
    const float (&own)[4] = acc[i / kTiles][i % kTiles];
    device::shared_store(to + 32 * i, float4{own[0], own[1], own[2], own[3]});
  }
}
template <int kTiles>
__device__ __forceinline__ void take_sums(float (&acc)[2][kTiles][4], const unsigned char* sums) {
  const float4* const from = reinterpret_cast<const float4*>(sums) + device::lane_index();
#pragma unroll
  for (int i = 0; i < 2 * kTiles; ++i) {
    float (&own)[4] = acc[i / kTiles][i % kTiles];
    const float4 other = device::shared_load<float4>(from + 32 * i);
    own[0] += other.x;
    own[1] += other.y;
    own[2] += other.z;
    own[3] += other.w;
  }
}

// kShared: three or six warps share a group of 32 pixels; otherwise each has one of 64 by itself.
template <typename T, int kColumns, bool kShared>
__global__ void __launch_bounds__(kShared ? kSharedThreads : 32 * Tile::kMaxGroups,
                                  kShared || kColumns == 48 ? 1 : 2)
    norm_relu_conv3x3_forward_kernel(Forward args, Images images) {
  using namespace device;
  constexpr int kTiles = kColumns / 8, kRowsOfTaps = kShared ? kTapRows : 1;
  constexpr int kGroup = kShared ? tiling::kForwardShared[0].pixels : Tile::kGroup;
  constexpr bool kKeepsParts = !kShared || kColumns < 48;
  const int share = kShared ? images.share : 1;
  const Layout layout{sizeof(T), kColumns, images.positions, images.groups, kGroup, share};
  const int threads = 32 * share * images.groups, warp = warp_index(), lane = lane_index();
  // A warp's row of taps and half of the depth, of all that its group has.
  const int own_taps = warp % kRowsOfTaps, pair = warp / kRowsOfTaps;
  const int own_half = kShared && pair >= images.groups;
  const int group = kShared ? pair - own_half * images.groups : warp;
  const bool writes = !kShared || (own_taps == 0 && own_half == 0);
  const int column0 = block_y() * kColumns;
  const int panels = max(1, panels_of<T>(args.channels));
  const int first_tile = images.first_tile(block_x(), grid_x());
  const int last_tile = images.first_tile(block_x() + 1, grid_x());
  unsigned char* shared = shared_memory();
  unsigned char* pixels = shared + layout.pixels_offset();

  clear_zeros(shared + layout.zero_offset(), kGroupZeroBytes, threads);
  const BlockMoments<kColumns> block_moments(shared + layout.moments_offset());
  WarpMoments moments{};
  if (writes) moments = block_moments.start(group);
  sync_threads();

  int load_tile = first_tile;
  int load_panel = 0;
  const int kept_thread = kept(thread_index());
  const unsigned char* halo_from = nullptr;  // of the tile
  const bool whole_rows = args.weight.vector == kChunk<T> && args.x.vector == kChunk<T> &&
                          args.outputs - column0 >= kColumns;
  bool whole_tile = false;
  const auto load = [&](int stage_index) {
    if (load_tile < last_tile) {
      unsigned char* stage = shared + stage_index * layout.stage_bytes();
      const int channel = load_panel * kPanelChannels<T>;
      unsigned char* halo = stage + layout.halo_offset();
      unsigned char* norm = shared + layout.norm_offset(stage_index);
      // What is kept of a thread's part over panels would spill in the widest blocks.
      const int thread = kKeepsParts ? kept_thread : kept(thread_index());
      const RowPart weight_part = RowPart::of<T>(args.weight_eights, thread);
      const RowPart halo_part = RowPart::of<T>(images.halo_eights, thread);
      if (!kKeepsParts || load_panel == 0) {
        halo_from = pixel_at<T>(args.x, images, load_tile, halo_part.first - images.width, 0,
                                halo_part.chunk);
        whole_tile = whole_rows && images.has_whole_halo(load_tile);
      }
      copy_scale_shift<T>(norm, args.norm, channel, args.channels, thread_index());
      if (whole_tile && channel + kPanelChannels<T> <= args.channels) {
        const unsigned char* const weight_from =
            chunk_at<T>(args.weight, kTaps * column0 + weight_part.first, 0, weight_part.chunk);
        const auto copy = [&](auto pitch) {
          copy_whole_rows<pitch>(stage, weight_from + load_panel * kPanelRowBytes, weight_part,
                                 row_pitch<T>(args.weight));
          copy_whole_rows<pitch>(halo, halo_from + load_panel * kPanelRowBytes, halo_part,
                                 row_pitch<T>(args.x));
        };
        if (kKeepsParts && args.usual)
          copy(std::integral_constant<int, kKeepsParts ? kUsualPitch<T> : 0>{});
        else
          copy(std::integral_constant<int, 0>{});
      } else {
        copy_tile_rows<T>(stage, args.weight,
                          {0, kTaps * column0, 0, kTaps * (args.outputs - column0),
                           kTaps * kColumns, channel, args.channels},
                          threads);
        copy_halo<T>(halo, images, TileOrigin(images, load_tile), args.x, channel, args.channels,
                     threads);
      }
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
    float acc[kGroup / 16][kTiles][4] = {};
    for (int panel = 0; panel < panels; ++panel) {
      cp_async_wait<0>();
      sync_threads();
      load(1 - stage_index);
      const int weight = stage_index * layout.stage_bytes(), halo = weight + layout.halo_offset();
      normalise_panel<T>(shared + halo, shared + layout.norm_offset(stage_index), images.positions,
                         threads);
      if (panel == 0) describe_tile(images, origin, pixels, images.groups * kGroup, threads);
      sync_threads();
      multiply_panel<T, kTapRows / kRowsOfTaps>(
          acc, shared, weight, layout.zero_offset(),
          operand_rows<kGroup / 16>(pixels, group * kGroup + a_row(lane), 16 * a_chunk(lane), halo,
                                    images.pitch),
          images.pitch, own_taps, 32 * own_half, !kShared || share == kTapRows);
      stage_index = 1 - stage_index;
    }
    const int end = column0 + kColumns < args.outputs ? column0 + kColumns : args.outputs;
    if constexpr (kShared) {
      // In the stage that was multiplied last, which the next tile fills after its first barrier.
      constexpr int kBytes = kGroup * kColumns * 4;
      unsigned char* sums =
          shared + (1 - stage_index) * layout.stage_bytes() + group * (share - 1) * kBytes;
      sync_threads();
      if (!writes) give_sums(acc, sums + (kTapRows * own_half + own_taps - 1) * kBytes);
      sync_threads();
      if (!writes) continue;
      for (int other = 0; other < share - 1; ++other) take_sums(acc, sums + other * kBytes);
    }
#pragma unroll
    for (int half = 0; half < kGroup / 32; ++half) {
      const unsigned char* rows = pixels + (group * kGroup + 32 * half) * kPixelBytes;
      write_rows<T, kTiles>(
          acc + 2 * half, shared + layout.staging_offset() + group * kStagingBytes, args.y,
          origin.pixel(images), column0, end, args.partial != nullptr, moments,
          [&](int r) { return static_cast<int>(shared_load<uint2>(rows + r * kPixelBytes).x); });
    }
  }
  if (args.partial)
    block_moments.template finish<1>(moments, images.groups,
                                     args.partial + int64_t(block_x()) * 3 * args.outputs, column0,
                                     args.outputs, (share - 1) * images.groups);
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
                    const Images& images, bool shared) {
  if (shared)
    launcher.launch<&norm_relu_conv3x3_forward_kernel<T, kColumns, true>>(shape, args, images);
  else
    launcher.launch<&norm_relu_conv3x3_forward_kernel<T, kColumns, false>>(shape, args, images);
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
    const device::RowTensor x_rows = row_tensor(call.x),
                            weight_rows = packed_rows<&norm_relu_conv3x3_forward_pack_kernel<T>, T>(
                                launcher, weight, packed);
    const Forward args{x_rows,
                       float_table(call.norm),
                       weight_rows,
                       output_row_tensor(call.y),
                       partial.data<float>(),
                       static_cast<int>(call.C),
                       static_cast<int>(call.K),
                       Eights(tiling::kTaps * tiling.columns, tiling.tile.warps()),
                       usual_rows<T>(x_rows) && usual_rows<T>(weight_rows)};
    const auto launch = tiling.columns == 16   ? launch_forward<T, 16>
                        : tiling.columns == 32 ? launch_forward<T, 32>
                                               : launch_forward<T, 48>;
    if (tiling.tile.blocks > 0)
      launch(launcher,
             {.grid_x = tiling.tile.blocks,
              .grid_y = ceil_div(call.K, tiling.columns),
              .block = tiling.tile.threads(),
              .shared_bytes = tiling.tile.shared_bytes,
              .tiles = tiling.tile.tiles,
              .ranges = tiling.tile.blocks},
             args, Images(tiling.tile, of, tiling.tile.warps()), tiling.tile.division.share > 1);
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
