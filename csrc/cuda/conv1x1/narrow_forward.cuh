// The 1x1 convolution's forward where there are few rows: tiles of 16 or 32 rows and 32 to 64
// columns, and the depth divided among the warps of a block. The operator is described in
// norm_relu_conv1x1_forward.cu.
//
// Who owns what: warp w multiplies every kWarps-th panel of channels from the w-th on, which it
// copies itself, ahead and across tiles: no barrier, only lanes wait for each other. Then all
// accumulators meet in shared memory, 32 columns at a time: each warp adds up its share of the
// tile's rows, warp by warp in order, a lane one column, rounds them, stores them and takes them
// into its running moments: exact two-pass over its rows of the tile, merged tile by tile.
// Bytes: x once for each column of the grid, its columns of the weight once per tile.
// What does not exist of rows and outputs is not copied: its products are not stored.
#pragma once

#include "../gemm/epilogue.cuh"
#include "forward.cuh"

namespace densenet_efficient::conv1x1_forward {

template <typename T, int kColumns, int kWarps, int kRowTiles>
struct NarrowLayout {
  static constexpr int kTileRows = 16 * kRowTiles;
  static constexpr int kWeightOffset = kTileRows * device::kPanelRowBytes;
  static constexpr int kNormOffset = kWeightOffset + kColumns * device::kPanelRowBytes;
  static constexpr int kStageBytes = kNormOffset + device::kScaleShiftBytes<T>;
  static constexpr int kStages = Tiling::narrow_stages(kTileRows);
  static constexpr int kSumsOffset = kWarps * kStages * kStageBytes;
  static constexpr int kGroups = (kColumns + 31) / 32;  // of columns, added up one after the other
  // Floats from row to row of a warp's sums: four rows, eight bytes of each lane, meet each bank
  // once.
  static constexpr int kPitch = Tiling::kNarrowPitch;
  static constexpr int kSumsBytes = kTileRows * kPitch * 4;  // of a warp
  static constexpr int kSharedBytes = kSumsOffset + kWarps * kSumsBytes;
  static_assert(device::BlockMoments<kColumns>::kWarpBytes <= kSumsBytes);
  static_assert(kSharedBytes ==
                Tiling::narrow_shared_bytes(kTileRows, kColumns, kWarps, sizeof(T)));
};

// A warp's panels ahead of the product. A lane copies one chunk of every eighth row.
template <typename T, int kColumns, int kWarps, int kRowTiles>
struct NarrowLoader {
  using Layout = NarrowLayout<T, kColumns, kWarps, kRowTiles>;
  const Forward& args;
  const int column0, panels, last_tile;
  const bool aligned;
  const int to;  // the lane's chunk of a panel; in registers, see device::kept
  const ScaleShiftCopy<T, 32> scale_shift;
  int tile, panel;
  const unsigned char *x, *weight;  // the lane's chunk of the next panel's first rows

  __device__ __forceinline__ NarrowLoader(const Forward& args, int column0, int panels,
                                          int first_tile, int last_tile)
      : args(args),
        column0(column0),
        panels(panels),
        last_tile(last_tile),
        aligned(args.x.vector == device::kChunk<T> &&
                args.weight.vector >= device::kOperandChannels<T> &&
                column0 + kColumns <= args.outputs),
        to(device::kept(
            device::panel_offset<T>(device::lane_index() >> 2, device::lane_index() & 3))),
        scale_shift(args.norm, device::lane_index()) {
    start(device::warp_index() < panels ? first_tile : last_tile);
  }

  // The warp's first panel of a tile.
  __device__ __forceinline__ void start(int next_tile) {
    using namespace device;
    tile = next_tile;
    panel = warp_index();
    const int row = lane_index() >> 2;
    const int channel = panel * kPanelChannels<T> + (lane_index() & 3) * kChunk<T>;
    x = reinterpret_cast<const unsigned char*>(
        args.x.at<T>(int64_t(tile) * Layout::kTileRows + row, channel));
    weight = reinterpret_cast<const unsigned char*>(args.weight.at<T>(column0 + row, channel));
  }

  // The next panel, to the stage's place.
  __device__ __forceinline__ void load(unsigned char* stage) {
    using namespace device;
    if (tile < last_tile) {
      const int channel = panel * kPanelChannels<T>;
      const int pitch = row_pitch<T>(args.x), weight_pitch = row_pitch<T>(args.weight);
      const int64_t left = args.rows - int64_t(tile) * Layout::kTileRows;
      if (aligned && channel + kPanelChannels<T> <= args.channels && left >= Layout::kTileRows) {
#pragma unroll
        for (int row = 0; row < Layout::kTileRows; row += 8)
          cp_async<16>(stage + to + row * kPanelRowBytes, x + int64_t(row) * pitch);
        with_alignment<T>(args.weight, [&]<int kBytes>(std::integral_constant<int, kBytes>) {
          copy_weight<kBytes>(stage, weight_pitch);
        });
        scale_shift.copy(stage + Layout::kNormOffset, args.norm, channel, lane_index());
      } else {
        const int rows = static_cast<int>(min(left, int64_t(Layout::kTileRows)));
        copy(stage, x, pitch, rows, channel, args.x.vector);
        copy(stage + Layout::kWeightOffset, weight, weight_pitch,
             min(args.outputs - column0, kColumns), channel, args.weight.vector);
        copy_scale_shift<T>(stage + Layout::kNormOffset, args.norm, channel, args.channels,
                            lane_index(), 32);
      }
      panel += kWarps;
      x += kWarps * kPanelRowBytes;
      weight += kWarps * kPanelRowBytes;
      if (panel >= panels) start(tile + 1);
    }
    cp_async_commit();
  }

  template <int kBytes>
  __device__ __forceinline__ void copy_weight(unsigned char* stage, int pitch) const {
#pragma unroll
    for (int row = 0; row < kColumns; row += 8)
      copy_aligned<kBytes>(stage + to + Layout::kWeightOffset + row * device::kPanelRowBytes,
                           weight + int64_t(row) * pitch, to);
  }

  // The rows that exist, and of them the channels.
  __device__ __forceinline__ void copy(unsigned char* panel_rows, const unsigned char* from,
                                       int pitch, int rows, int channel, int vector) const {
    using namespace device;
    const int left = args.channels - channel - (lane_index() & 3) * kChunk<T>;
#pragma unroll 1
    for (int row = lane_index() >> 2; row < rows; row += 8, from += 8 * int64_t(pitch))
      copy_chunk(panel_rows + to + (row & ~7) * kPanelRowBytes, reinterpret_cast<const T*>(from),
                 left, vector);
  }
};

// A value as it is stored, and what was stored.
template <typename T>
__device__ __forceinline__ float store_rounded(T* to, float value, bool exists) {
  using namespace device;
  if constexpr (kIs16Bit<T>) {
    const uint32_t two = pack<T>(value, value);
    if (exists) global_store(to, static_cast<uint16_t>(two));
    return unpack<T>(two).x;
  } else {
    if (exists) global_store(to, value);
    return value;
  }
}

// The running moments of the rows that a warp stores: of a lane's column of each 32.
template <int kGroups>
struct LaneMoments {
  float mean[kGroups] = {}, m2[kGroups] = {}, count = 0.0f;

  // Of the group's column the first `taken` of the values; share: theirs of all rows.
  template <int kRows>
  __device__ __forceinline__ void add(int group, const float (&values)[kRows], int taken,
                                      float reciprocal, float share) {
    float own = 0.0f, squares = 0.0f;
#pragma unroll
    for (int r = 0; r < kRows; ++r) own += r < taken ? values[r] : 0.0f;
    own *= reciprocal;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float centred = r < taken ? values[r] - own : 0.0f;
      squares += centred * centred;
    }
    const float2 all =
        device::merge_shared(float2{mean[group], m2[group]}, float2{own, squares}, count, share);
    mean[group] = all.x;
    m2[group] = all.y;
  }
};

// The rows of a tile that a warp adds up, `taken` of them, and what their moments are merged by.
struct NarrowRows {
  int64_t first;
  int taken;
  float reciprocal, share, all;

  template <int kRows>
  __device__ __forceinline__ static NarrowRows of(int64_t first, int64_t rows, float before) {
    const int taken = static_cast<int>(max(min(rows - first, int64_t(kRows)), int64_t(0)));
    const float count = static_cast<float>(taken), all = before + count;
    return {first, taken, count > 0.0f ? 1.0f / count : 0.0f, all > 0.0f ? count / all : 0.0f, all};
  }
};

// Adds up the warp's rows of one group of columns, stores them and takes them into its moments.
template <typename T, int kColumns, int kWarps, int kRowTiles, int kGroups>
__device__ __forceinline__ void finish_rows(const float* sums, const Forward& args,
                                            const NarrowRows& rows, int column0, int group,
                                            LaneMoments<kGroups>& moments) {
  using namespace device;
  using Layout = NarrowLayout<T, kColumns, kWarps, kRowTiles>;
  constexpr int kRows = Layout::kTileRows / kWarps, kOfWarp = Layout::kSumsBytes / 4;
  const int column = 32 * group + lane_index();
  if (rows.taken == 0 || column >= kColumns) return;
  const bool exists = column0 + column < args.outputs;
  const int pitch = static_cast<int>(args.y.stride) * static_cast<int>(sizeof(T));
  T* const to = args.y.at<T>(rows.first, column0 + column);
  float values[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const float* const from = sums + (kRows * warp_index() + r) * Layout::kPitch + lane_index();
    float sum = shared_load<float>(from);
#pragma unroll
    for (int warp = 1; warp < kWarps; ++warp) sum += shared_load<float>(from + warp * kOfWarp);
    values[r] = store_rounded(advance(to, r, pitch), sum, exists && r < rows.taken);
  }
  if (args.partial) moments.add(group, values, rows.taken, rows.reciprocal, rows.share);
}

template <typename T, int kColumns, int kWarps, int kRowTiles>
__global__ void __launch_bounds__(32 * kWarps, Tiling::narrow_resident(16 * kRowTiles, kWarps))
    norm_relu_conv1x1_forward_narrow_kernel(Forward args) {
  using namespace device;
  using Layout = NarrowLayout<T, kColumns, kWarps, kRowTiles>;
  constexpr int kStages = Layout::kStages;
  constexpr int kTiles = kColumns / 8;
  const int warp = warp_index(), lane = lane_index();
  const int column0 = block_y() * kColumns;
  const int panels = panels_of<T>(args.channels);
  const int first_tile = static_cast<int>(int64_t(args.tiles) * block_x() / grid_x());
  const int last_tile = static_cast<int>(int64_t(args.tiles) * (block_x() + 1) / grid_x());
  unsigned char* const stages = shared_memory() + warp * kStages * Layout::kStageBytes;
  float* const sums = reinterpret_cast<float*>(shared_memory() + Layout::kSumsOffset);

  const OperandPlaces<T> places(0, Layout::kWeightOffset);
  float* const own =
      sums + warp * (Layout::kSumsBytes / 4) + (lane >> 2) * Layout::kPitch + 2 * (lane & 3);
  LaneMoments<Layout::kGroups> moments;
  NarrowLoader<T, kColumns, kWarps, kRowTiles> loader(args, column0, panels, first_tile, last_tile);
  for (int stage = 0; stage < kStages - 1; ++stage)
    loader.load(stages + stage * Layout::kStageBytes);

  int stage = 0;
  for (int tile = first_tile; tile < last_tile; ++tile) {
    float acc[kRowTiles][kTiles][4] = {};
    for (int panel = warp; panel < panels; panel += kWarps) {
      cp_async_wait<kStages - 2>();
      sync_warp();
      loader.load(stages + (stage == 0 ? kStages - 1 : stage - 1) * Layout::kStageBytes);
      const unsigned char* const from = stages + stage * Layout::kStageBytes;
#pragma unroll
      for (int step = 0; step < 2; ++step)
        multiply_step<T, kRowTiles, kTiles>(acc, from, Layout::kNormOffset, places, step);
      stage = stage == kStages - 1 ? 0 : stage + 1;
    }
    constexpr int kRows = Layout::kTileRows / kWarps;
    const NarrowRows rows = NarrowRows::of<kRows>(int64_t(tile) * Layout::kTileRows + kRows * warp,
                                                  args.rows, moments.count);
#pragma unroll
    for (int group = 0; group < Layout::kGroups; ++group) {
      if (group > 0 || tile > first_tile) sync_threads();  // the sums before these are read
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
        for (int j = 4 * group; j < 4 * group + 4 && j < kTiles; ++j) {
          const float (&d)[4] = acc[m][j];
          float* const to = own + 16 * m * Layout::kPitch + 8 * (j - 4 * group);
          shared_store(to, float2{d[0], d[1]});
          shared_store(to + 8 * Layout::kPitch, float2{d[2], d[3]});
        }
      }
      sync_threads();
      finish_rows<T, kColumns, kWarps, kRowTiles>(sums, args, rows, column0, group, moments);
    }
    moments.count = rows.all;
  }
  if (!args.partial) return;
  sync_threads();
  const BlockMoments<kColumns> block_moments(shared_memory() + Layout::kSumsOffset);
  const WarpMoments of_warp = block_moments.start(warp);
#pragma unroll
  for (int group = 0; group < Layout::kGroups; ++group) {
    const int column = 32 * group + lane;
    if (column >= kColumns) break;
    shared_store(of_warp.mean + column, moments.mean[group]);
    shared_store(of_warp.m2 + column, moments.m2[group]);
  }
  block_moments.template finish<1>(WarpMoments{of_warp.mean, of_warp.m2, moments.count}, kWarps,
                                   args.partial + int64_t(block_x()) * 3 * args.outputs, column0,
                                   args.outputs);
}

}  // namespace densenet_efficient::conv1x1_forward
