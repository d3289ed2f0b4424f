// The 1x1 convolution's backward, from the side of one warp: the 16 channels that it owns, with
// their columns of the weight, of dx, of the sums and of dweight. The operator is described in
// norm_relu_conv1x1_backward.cu.
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
// chunks, of every row_step-th row from `row` on; eight threads cover two rows of a panel, a team
// of them two rows of all panels. Of x and dx: a chunk of some rows of the panel of its own warp's
// channels (of 16 bits, of a pair of warps').
template <typename T, int kOutputs>
struct TileLoader {
  static constexpr unsigned kTeam = 8 * tiling::panels(kOutputs, sizeof(T));
  static constexpr int kSize = static_cast<int>(sizeof(T));
  static constexpr int kOwnRows = device::kIs16Bit<T> ? 2 : 4, kOwnStep = kTileRows / kOwnRows;
  const Backward& args;
  const Layout layout;
  int row, row_step, byte, column;         // column: where its chunk of row 0 lies
  int own_from, own_offset;                // where the first of its own chunks comes from and lies
  bool exists;                             // its channels of dz_y
  bool own_whole;                          // its own channels all exist
  int64_t row0;                            // of the next tile
  const unsigned char *dz_y, *y, *x, *dx;  // the tile's first row

  __device__ __forceinline__ TileLoader(const Backward& args, const Layout& layout, int64_t row0,
                                        int block_channel0)
      : args(args), layout(layout), row0(row0) {
    using namespace device;
    const unsigned thread = thread_index(), teams = 32 * layout.warps / kTeam;
    row = thread < teams * kTeam ? 2 * (thread / kTeam) + thread / 4 % 2 : kTileRows;
    row_step = 2 * teams;
    byte = (thread % kTeam / 8 * 4 + thread % 4) * 16;
    column = thread % kTeam / 8 * kPanelBytes + thread % 4 * 16;
    // A warp by itself has two chunks a row; the order of its rows spares it bank conflicts.
    const int warp = warp_index(), lane = lane_index();
    const bool pair = kIs16Bit<T> && (warp | 1) < layout.warps;
    const int panel = kIs16Bit<T> ? warp / 2 : warp;
    const int own_chunk = kIs16Bit<T> && !pair ? lane & 1 : lane & 3;
    const int own_row = !kIs16Bit<T> ? lane >> 2
                        : pair       ? (lane >> 2) + 8 * (warp & 1)
                                     : spread(lane >> 1);
    const int own_byte = block_channel0 * kSize + panel * kPanelRowBytes + own_chunk * 16;
    own_offset = panel * kPanelBytes + panel_offset<T>(own_row, own_chunk);
    own_from = own_row * args.pitch + own_byte;
    exists = byte < args.outputs * kSize;
    own_whole = own_byte + 16 <= args.channels * kSize;
    dz_y = reinterpret_cast<const unsigned char*>(args.dz_y.at<T>(row0, 0));
    y = reinterpret_cast<const unsigned char*>(args.y.at<T>(row0, 0));
    x = reinterpret_cast<const unsigned char*>(args.x.at<T>(row0, 0));
    dx = reinterpret_cast<const unsigned char*>(args.dx.at<T>(row0, 0));
  }

  // Of a row in its column.
  __device__ __forceinline__ int offset(int row) const {
    return device::swizzle_chunks<T>(row * device::kPanelRowBytes) ^ column;
  }

  // Zeros, in all stages, where its column of dz_y and y has no channels: nothing is copied there.
  __device__ __forceinline__ void clear(unsigned char* shared) const {
    for (int stage = 0; !exists && stage < layout.stages(); ++stage) {
      for (int r = row; r < kTileRows; r += row_step) {
        unsigned char* const at = shared + stage * args.stage_bytes + offset(r);
        device::shared_store(at, uint4{0, 0, 0, 0});
        device::shared_store(at + layout.y_offset(), uint4{0, 0, 0, 0});
      }
    }
  }

  // The next tile, of which `rows` rows exist, to the stage. Whole chunks go by the tile's address
  // and 32 bits of the thread's; what the end of the rows or channels cuts, or is not aligned, goes
  // a way of its own.
  __device__ __forceinline__ void load(unsigned char* stage, int rows) {
    using namespace device;
    const bool whole = rows == kTileRows && args.whole_chunks;
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
      if (exists) {
        const auto copy_row = [&](int r) {
          unsigned char* const to = stage + offset(r);
          const auto at = static_cast<uint32_t>(r * args.gradient_pitch + byte);
          cp_async<16>(to, dz_y + at);
          cp_async<16>(to + layout.y_offset(), y + at);
        };
        int r = row;
#pragma unroll 1
        for (; r + row_step < kTileRows; r += 2 * row_step) {
          copy_row(r);
          copy_row(r + row_step);
        }
        if (r < kTileRows) copy_row(r);
      }
      x += kTileRows * int64_t(args.pitch);
      dx += kTileRows * int64_t(args.pitch);
      dz_y += kTileRows * int64_t(args.gradient_pitch);
      y += kTileRows * int64_t(args.gradient_pitch);
    } else {
#pragma unroll 1
      for (int r = row; r < kTileRows; r += row_step) {
        copy(stage + offset(r), args.dz_y, r, rows, byte, args.outputs);
        copy(stage + layout.y_offset() + offset(r), args.y, r, rows, byte, args.outputs);
      }
    }
    row0 += kTileRows;
  }

  // One chunk of the tile's row r, if it is one of its `rows`.
  __device__ __forceinline__ void copy(unsigned char* to, const device::RowTensor& from, int r,
                                       int rows, int first_byte, int channels) const {
    const int channel = first_byte / kSize;
    // Not below zero: without saying so, 128 outputs of 16 bits spill a register on sm_90a.
    device::copy_chunk(to, from.at<T>(row0 + r, channel), r < rows ? max(channels - channel, 0) : 0,
                       from.vector);
  }

  // dy over dz_y, in place: each thread works on the chunks that it copied itself, all of them of
  // the same columns.
  __device__ __forceinline__ void form_dy(unsigned char* stage, const unsigned char* correction,
                                          int rows) const {
    using namespace device;
    float4 entries[4][kOperandChannels<T>];
#pragma unroll
    for (int i = 0; i < kChunk<T>; ++i)
      entries[i / kOperandChannels<T>][i % kOperandChannels<T>] =
          shared_load<float4>(correction + i * layout.correction_pitch() + byte);
    for (int r = row; r < kTileRows; r += row_step) {
      unsigned char* const at = stage + offset(r);
      uint32_t dz[4], of_y[4];
      to_array(shared_load<uint4>(at), dz);
      to_array(shared_load<uint4>(at + layout.y_offset()), of_y);
      uint32_t dy[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) dy[i] = correct_operand<T>(dz[i], of_y[i], entries[i]);
      shared_store(at, uint4{dy[0], dy[1], dy[2], dy[3]});
    }
    if (rows == kTileRows) return;
#pragma unroll 1
    for (int r = row; r < kTileRows; r += row_step)
      if (r >= rows) shared_store(stage + offset(r), uint4{0, 0, 0, 0});
  }
};

// The warp's 16 channels and what it keeps of them in registers. The data gradient's two 8-column
// tiles are spread so that a lane holds four neighbouring channels, 4 t to 4 t + 3 of the warp's:
// tile j, column 2 t + e is channel 4 t + 2 j + e. The weight gradient's tiles lie in channel
// order.
template <typename T, int kOutputs>
struct WarpChannels {
  static constexpr int kSteps = kOutputs / device::kDepth<T>;  // of the data gradient's depth
  static constexpr int kRows = kOutputs / 16;                  // of dweight's tiles
  const float* norm;  // in shared memory, at the warp's first channel
  int norm_pitch;     // between its rows
  int channel0;       // of the warp
  // Where the lane's operands and accumulators of the first rows lie in the panels.
  int of_product, of_channels, of_dy[device::kPointers<T>], of_x[device::kPointers<T>];
  unsigned char* dx;  // the lane's four channels of its first row in the tile
  int lane_row;       // the tile's row that is its first; past the tile where it has no channels
  uint32_t weight[kSteps][2][2];
  float dgamma[4], dbeta[4];  // of the lane's four channels
  float dweight[kRows][2][4];

  __device__ __forceinline__ WarpChannels(const Backward& args, const float* norm, int channel0,
                                          int64_t row0)
      : norm(norm), norm_pitch(16 * args.warps), channel0(channel0) {
    using namespace device;
    const int lane = lane_index(), warp = warp_index(), g = lane >> 2, t = lane & 3;
    const int panel = sixteen_offset<T>(warp, kPanelBytes), chunk0 = sixteen_swizzle<T>(warp) / 16;
    of_product = panel_offset<T>(spread(a_row(lane)), a_chunk(lane));
    of_channels = panel + byte_offset<T>(spread(g), chunk0, 4 * static_cast<int>(sizeof(T)) * t);
#pragma unroll
    for (int i = 0; i < kPointers<T>; ++i) {
      of_dy[i] = byte_offset<T>(a_depth<T>(lane, i), 0, a_byte<T>(lane));
      of_x[i] = panel + byte_offset<T>(b_depth<T>(lane, i), chunk0, b_byte<T>(lane));
    }
    of_product = kept(of_product);
    of_channels = kept(of_channels);
    of_dy[0] = kept(of_dy[0]);
    of_x[0] = kept(of_x[0]);
    const int first = channel0 + 4 * t;
    dx = reinterpret_cast<unsigned char*>(args.dx.at<T>(row0 + spread(g), first));
    lane_row = first < args.channels ? spread(g) : kTileRows;
    lane_row = kept(lane_row);
#pragma unroll
    for (int i = 0; i < 4; ++i) dgamma[i] = dbeta[i] = 0.0f;
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) dweight[m][j][i] = 0.0f;
      }
    }
    // Column g of tile j is channel 4 (g / 2) + 2 j + g % 2: both tiles come with four channels.
    const int channel = channel0 + 4 * (g >> 1);
    // Outputs past the end have no dy: any row of the weight serves.
    const int left = args.outputs ? args.channels - channel : 0;
    const int pitch = static_cast<int>(args.weight.stride) * static_cast<int>(sizeof(T));
    const T* const rows = args.weight.at<T>(0, channel);
    const auto four = [&](int row) {
      row = min(row + kOperandChannels<T> * t, args.outputs - 1);
      return load_four(advance(rows, row, pitch), left, args.weight.vector);
    };
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = kDepth<T> * k + kDepth<T> / 2 * half;
        if constexpr (kIs16Bit<T>) {
          const uint2 even = four(row), odd = four(row + 1);
          const int shift = 16 * (g & 1);
          weight[k][0][half] = ((even.x >> shift) & 0xffffu) | ((odd.x >> shift) & 0xffffu) << 16;
          weight[k][1][half] = ((even.y >> shift) & 0xffffu) | ((odd.y >> shift) & 0xffffu) << 16;
        } else {
          const uint4 row_words = four(row);
          weight[k][0][half] = round_operand<T>(g & 1 ? row_words.y : row_words.x);
          weight[k][1][half] = round_operand<T>(g & 1 ? row_words.w : row_words.z);
        }
      }
    }
  }

  // Four neighbouring channels of one row of the norm.
  __device__ __forceinline__ void load_norm(NormRow row, float (&values)[4]) const {
    const float4 four =
        device::shared_load<float4>(norm + row * norm_pitch + 4 * (device::lane_index() & 3));
    values[0] = four.x;
    values[1] = four.y;
    values[2] = four.z;
    values[3] = four.w;
  }

  // The data gradient of 16 of the tile's rows: product, mask, sums, dx. The product takes the rows
  // in the order of `spread`. From the lane's first row on `rows` exist. kWhole: whole chunks.
  template <bool kWhole>
  __device__ __forceinline__ void data_gradient(const unsigned char* stage, const Layout& layout,
                                                int tile_row, int rows, const Backward& args) {
    using namespace device;
    const unsigned char* const dy = stage + tile_row * kPanelRowBytes;
    float acc[2][4] = {};
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      uint32_t left[4];
      ldmatrix_x4(left, dy + k / 2 * kPanelBytes + (of_product ^ (32 * (k % 2))));
      multiply_add<T>(acc[0], left, weight[k][0]);
      multiply_add<T>(acc[1], left, weight[k][1]);
    }
    float a[4], s[4], mean[4];
    load_norm(kScale, a);
    load_norm(kShift, s);
    load_norm(kMean, mean);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const unsigned char* const own = stage + of_channels + (tile_row + 8 * half) * kPanelRowBytes;
      float values[4], sum[4];
      unpack_four<T>(shared_load<Four<T>>(own + layout.x_offset()), values);
      unpack_four<T>(shared_load<Four<T>>(own + args.dx_offset), sum);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        // Lane t holds channel 4 t + i in tile i / 2, column 2 t + i % 2.
        const float dz =
            relu_mask(acc[i >> 1][2 * half + (i & 1)], normalise(values[i], a[i], s[i]));
        dgamma[i] += dz * (values[i] - mean[i]);
        dbeta[i] += dz;
        sum[i] += a[i] * dz;
      }
      if (tile_row + 8 * half >= rows) continue;
      unsigned char* const to = advance(dx, tile_row + 8 * half, args.pitch);
      if constexpr (kWhole)
        global_store(to, pack_four<T>(sum));
      else
        store_four(reinterpret_cast<T*>(to), pack_four<T>(sum),
                   args.channels - channel0 - 4 * (lane_index() & 3), args.dx.vector);
    }
  }

  // dweight += dy^T @ relu(a * x + s) over 16 of the tile's rows.
  __device__ __forceinline__ void weight_gradient(const unsigned char* stage, const Layout& layout,
                                                  int tile_row) {
    using namespace device;
    OperandNorm<T> norms[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float* of_channel = norm + 8 * j + (lane_index() >> 2);
      norms[j] = same_norm<T>(shared_load<float>(of_channel + kScale * norm_pitch),
                              shared_load<float>(of_channel + kShift * norm_pitch));
    }
#pragma unroll
    for (int depth = 0; depth < 16; depth += kDepth<T>) {
      const unsigned char* const dy = stage + (tile_row + depth) * kPanelRowBytes;
      uint32_t h[4];
      load_b_transposed<T>(h, dy + layout.x_offset(), of_x, 0);
#pragma unroll
      for (int i = 0; i < 4; ++i) h[i] = norm_relu_operand<T>(h[i], norms[i >> 1]);
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
        uint32_t outputs[4];
        load_a_transposed<T>(outputs, dy + sixteen_offset<T>(m, kPanelBytes), of_dy,
                             sixteen_swizzle<T>(m));
        multiply_add_pair<T>(dweight[m][0], dweight[m][1], outputs, h);
      }
    }
  }

  // To the block's partial [K + 2, pitch] at the warp's channels.
  __device__ __forceinline__ void write(const Backward& args, float* partial) {
    using namespace device;
    const int lane = lane_index(), g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int mask = 4; mask < 32; mask *= 2) {
        dgamma[i] += shuffle_xor(dgamma[i], mask);
        dbeta[i] += shuffle_xor(dbeta[i], mask);
      }
    }
    if (g == 0) {
      float rstd[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int channel = channel0 + 4 * t + i;
        rstd[i] = channel < args.channels
                      ? global_load<float>(args.norm.data + kRstd * args.norm.stride + channel)
                      : 0.0f;
      }
      float* sums = partial + args.outputs * args.partial_pitch + channel0 + 4 * t;
      global_store(sums, float4{dgamma[0] * rstd[0], dgamma[1] * rstd[1], dgamma[2] * rstd[2],
                                dgamma[3] * rstd[3]});
      global_store(sums + args.partial_pitch, float4{dbeta[0], dbeta[1], dbeta[2], dbeta[3]});
    }
    if (!args.weight_gradient) return;
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = 16 * m + 8 * half + g;
          if (row < args.outputs)
            global_store(partial + row * args.partial_pitch + channel0 + 8 * j + 2 * t,
                         float2{dweight[m][j][2 * half], dweight[m][j][2 * half + 1]});
        }
      }
    }
  }
};

}  // namespace densenet_efficient::conv1x1_backward
