// The 1x1 convolution's backward: its arguments, and how a block's threads copy a tile and form its
// dy. The operator is described in norm_relu_conv1x1_backward.cu.
#pragma once

#include "../gemm/row_tensor.h"
#include "../tiling/conv1x1.h"

namespace densenet_efficient::conv1x1_backward {

using Tiling = tiling::NormReluConv1x1Backward;
using Layout = Tiling::Layout;

constexpr int kTileRows = Layout::kTileRows;
constexpr int kPanelBytes = Layout::kPanelBytes;

struct Backward {
  device::RowTensor dz_y, y;  // [M, K]
  device::Table correction;   // [4, K]
  device::RowTensor x;        // [M, C]
  device::Table norm;         // [5, C]
  device::RowTensor weight;   // [K, C]
  device::RowTensor dx;       // [M, C]
  float* partial;             // [row blocks, K + 2, pitch]: dweight, dgamma, dbeta
  int64_t partial_pitch;      // channels of a partial row
  int64_t rows;               // M
  int channels, outputs;      // C, K
  int warps;                  // of a block
  int channel_blocks;         // blocks that share a range of rows
  int gradient_pitch, pitch;  // bytes between two rows of dz_y, and of dx
  int stage_bytes, dx_offset, correction_offset, norm_offset;  // of Layout
  int weight_gradient;                                         // whether it is wanted
  // Whether all are aligned to 16 bytes, channels come in fours and outputs in chunks, and the rows
  // of dz_y and y, and those of x and dx, are as far from each other.
  int whole_chunks;
};

// The row of sixteen that comes r-th where eight bytes, or two chunks, of each are taken: bits 1
// and 2 change places, so that rows that are taken at the same time do not share banks.
__device__ __forceinline__ int spread(int r) { return (r & 9) | ((r & 2) << 1) | ((r & 4) >> 1); }

// What a thread copies of each tile, and where the next one's begins. Of dz_y and y: one column of
// chunks, of every row_step-th row. Eight threads cover two rows of a panel, a team of them two
// rows of all panels; there are as many teams as the block has threads for, down to a power of two.
// Of x and dx: one chunk of every kOwnStep-th row. Again eight threads cover two rows of a panel,
// neighbouring ones the next panel, so that a warp touches few lines of memory; where the warps are
// odd in number the last one copies its half of a 16-bit panel by itself.
template <typename T, int kOutputs>
struct TileLoader {
  static constexpr unsigned kTeam = 8 * tiling::panels(kOutputs, sizeof(T));
  static constexpr int kSize = static_cast<int>(sizeof(T));
  static constexpr int kOwnRows = device::kIs16Bit<T> ? 2 : 4, kOwnStep = kTileRows / kOwnRows;
  const Backward& args;
  const Layout layout;
  int row_step;
  int byte;                                // of its column in a row of dz_y
  int from, offset;                        // where its first chunk of dz_y comes from and lies
  int own_from, own_offset;                // where its first chunk of x comes from and lies
  bool active;                             // whether it copies any of dz_y
  bool own_whole;                          // its channels of x all exist
  int tile;                                // the next one
  const unsigned char *dz_y, *y, *x, *dx;  // the tile's first row

  __device__ __forceinline__ TileLoader(const Backward& args, const Layout& layout, int64_t row0,
                                        int block_channel0, unsigned char* shared)
      : args(args), layout(layout), tile(static_cast<int>(row0 / kTileRows)) {
    using namespace device;
    const int thread = thread_index(), team = thread / kTeam, eight = thread >> 3;
    int teams = 1;
    while (2 * teams * kTeam <= 32u * layout.warps && 2 * teams <= kTileRows / 2) teams *= 2;
    row_step = 2 * teams;
    const int row = 2 * team + (thread >> 2 & 1), chunk = thread & 3;
    const int panel = thread % kTeam / 8;
    byte = panel * kPanelRowBytes + chunk * 16;
    from = row * args.gradient_pitch + byte;
    offset = panel * kPanelBytes + panel_offset<T>(row, chunk);
    active = team < teams && byte < args.outputs * kSize;
    if (team < teams && !active) clear(shared);

    const int panels = kIs16Bit<T> ? layout.warps / 2 : layout.warps;
    const bool half = eight >= kOwnStep / 2 * panels;  // the last warp has half a panel
    const int lane = lane_index();
    // The order of its rows spares it bank conflicts.
    const int own_row = half ? spread(lane >> 1) : 2 * (eight / max(panels, 1)) + (thread >> 2 & 1);
    const int own_chunk = half ? lane & 1 : chunk;
    const int own_panel = half ? panels : eight % max(panels, 1);
    const int own_byte = block_channel0 * kSize + own_panel * kPanelRowBytes + own_chunk * 16;
    own_offset = own_panel * kPanelBytes + panel_offset<T>(own_row, own_chunk);
    own_from = own_row * args.pitch + own_byte;
    own_whole = own_byte + 16 <= args.channels * kSize;
    dz_y = reinterpret_cast<const unsigned char*>(args.dz_y.at<T>(row0, 0));
    y = reinterpret_cast<const unsigned char*>(args.y.at<T>(row0, 0));
    x = reinterpret_cast<const unsigned char*>(args.x.at<T>(row0, 0));
    dx = reinterpret_cast<const unsigned char*>(args.dx.at<T>(row0, 0));
  }

  // Calls f(r) for each of its rows of dz_y: the r-th after its first.
  template <typename F>
  __device__ __forceinline__ void for_rows(F f) const {
    if (row_step == kTileRows / 2) {  // sixteen teams: what depends on r is known beforehand
      f(0);
      f(kTileRows / 2);
    } else {
#pragma unroll 1
      for (int r = 0; r < kTileRows; r += row_step) f(r);
    }
  }
  // Where its chunk of that row lies, and the row of the tile.
  __device__ __forceinline__ int after(int r) const {
    return (offset ^ device::row_swizzle<T>(r)) + r * device::kPanelRowBytes;
  }
  __device__ __forceinline__ int row_after(int r) const {
    return offset % kPanelBytes / device::kPanelRowBytes + r;
  }

  // Zeros, in all stages, where its column of dz_y and y has no channels: nothing is copied there.
  __device__ __forceinline__ void clear(unsigned char* shared) const {
    for (int stage = 0; stage < layout.stages(); ++stage) {
      for_rows([&](int r) {
        unsigned char* const at = shared + stage * args.stage_bytes + after(r);
        device::shared_store(at, uint4{0, 0, 0, 0});
        device::shared_store(at + layout.y_offset(), uint4{0, 0, 0, 0});
      });
    }
  }

  // The next tile to the stage: all of its rows exist, or only the first `rows`. Whole chunks go by
  // the tile's address and 32 bits of the thread's; what the end of the rows or channels cuts, or
  // is not aligned, goes a way of its own.
  __device__ __forceinline__ void load(unsigned char* stage, bool all_rows, int rows) {
    using namespace device;
    const bool whole = all_rows && args.whole_chunks;
    if (all_rows) rows = kTileRows;
    unsigned char* const own = stage + layout.x_offset() + own_offset;
    unsigned char* const own_dx = stage + args.dx_offset + own_offset;
    if (whole && own_whole) {
#pragma unroll
      for (int i = 0; i < kTileRows; i += kOwnStep) {
        const auto at = static_cast<uint32_t>(own_from + i * args.pitch);
        cp_async<16>(own + i * kPanelRowBytes, x + at);
        cp_async<16>(own_dx + i * kPanelRowBytes, dx + at);
      }
    } else {
      const int own_row = own_offset % kPanelBytes / kPanelRowBytes;
      const int own_byte = own_from - own_row * args.pitch;
#pragma unroll 1
      for (int i = 0; i < kTileRows; i += kOwnStep) {
        copy(own + i * kPanelRowBytes, args.x, own_row + i, rows, own_byte, args.channels);
        copy(own_dx + i * kPanelRowBytes, args.dx, own_row + i, rows, own_byte, args.channels);
      }
    }
    if (whole) {
      if (active) {
        for_rows([&](int r) {
          unsigned char* const to = stage + after(r);
          const auto at = static_cast<uint32_t>(from + r * args.gradient_pitch);
          cp_async<16>(to, dz_y + at);
          cp_async<16>(to + layout.y_offset(), y + at);
        });
      }
      x += kTileRows * int64_t(args.pitch);
      dx += kTileRows * int64_t(args.pitch);
      dz_y += kTileRows * int64_t(args.gradient_pitch);
      y += kTileRows * int64_t(args.gradient_pitch);
    } else if (active) {
#pragma unroll 1
      for (int r = 0; r < kTileRows; r += row_step) {
        unsigned char* const to = stage + after(r);
        copy(to, args.dz_y, row_after(r), rows, byte, args.outputs);
        copy(to + layout.y_offset(), args.y, row_after(r), rows, byte, args.outputs);
      }
    }
    ++tile;
  }

  // One chunk of the tile's row r, if it is one of its `rows`.
  __device__ __forceinline__ void copy(unsigned char* to, const device::RowTensor& from, int r,
                                       int rows, int first_byte, int channels) const {
    const int channel = first_byte / kSize;
    // Not below zero: without saying so, 128 outputs of 16 bits spill a register on sm_90a.
    device::copy_chunk(to, from.at<T>(int64_t(tile) * kTileRows + r, channel),
                       r < rows ? max(channels - channel, 0) : 0, from.vector);
  }

  // dy over dz_y, in place: each thread works on the chunks that it copied itself, all of them of
  // the same columns.
  __device__ __forceinline__ void form_dy(unsigned char* stage, const unsigned char* correction,
                                          bool all_rows, int rows) const {
    using namespace device;
    if (!active) return;
    float4 entries[4][kOperandChannels<T>];
#pragma unroll
    for (int i = 0; i < kChunk<T>; ++i)
      entries[i / kOperandChannels<T>][i % kOperandChannels<T>] =
          shared_load<float4>(correction + i * layout.correction_pitch() + byte);
    // One at a time: two would spill.
#pragma unroll 1
    for (int r = 0; r < kTileRows; r += row_step) {
      unsigned char* const at = stage + after(r);
      uint32_t dz[4], of_y[4];
      to_array(shared_load<uint4>(at), dz);
      to_array(shared_load<uint4>(at + layout.y_offset()), of_y);
      uint32_t dy[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) dy[i] = correct_operand<T>(dz[i], of_y[i], entries[i]);
      shared_store(at, uint4{dy[0], dy[1], dy[2], dy[3]});
    }
    if (all_rows) return;
#pragma unroll 1
    for (int r = 0; r < kTileRows; r += row_step)
      if (row_after(r) >= rows) shared_store(stage + after(r), uint4{0, 0, 0, 0});
  }
};

}  // namespace densenet_efficient::conv1x1_backward
