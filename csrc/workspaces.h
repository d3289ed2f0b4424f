// The scratch of every operator by name and shape, for the memory plan. The sizes themselves stand
// where the launchers take them from: cpu/tiling.h for the CPU, cuda/tiling for CUDA.
// CUDA figures are for rows aligned to 16 bytes, and bounds where a
// kernel's own tiles decide.
#pragma once

#include <algorithm>
#include <functional>
#include <map>
#include <string>

#include "cpu/tiling.h"
#include "cuda/tiling/columns.h"
#include "cuda/tiling/conv3x3.h"

namespace densenet_efficient::workspace {

// A call as the workspace functions see it. A row tensor [M, C] is N = M images of one pixel.
struct Call {
  int64_t N, H, W, C;  // x
  int64_t K;           // channels of y, 0 where y is no product
  int64_t size;        // bytes of an element: of arithmetic on the CPU, of an activation on CUDA
  int64_t threads;     // of the CPU; on CUDA the device's multiprocessors

  int64_t rows() const { return N * H * W; }
  int64_t pooled_rows() const { return N * (H / 2) * (W / 2); }
  int multiprocessors() const { return static_cast<int>(threads); }
};

// The most bytes that an operator holds at a time; operators without an entry allocate nothing.
using Sizes = std::map<std::string, std::function<int64_t(const Call&)>>;

inline const Sizes& cpu_sizes() {
  static const Sizes sizes = {
      {"channel_stats",
       [](const Call& c) { return cpu::ChannelStats(c.rows(), c.C, c.size, c.threads).bytes; }},
      {"norm_relu_conv1x1_forward",
       [](const Call& c) {
         return cpu::ProductForward(c.rows(), c.C, c.K, c.size, c.threads).bytes;
       }},
      {"norm_relu_conv1x1_backward",
       [](const Call& c) {
         return cpu::ProductBackward(c.rows(), c.C, c.K, c.size, c.threads).bytes;
       }},
      {"norm_relu_conv3x3_forward",
       [](const Call& c) {
         return cpu::Conv3x3Forward(c.N, c.H, c.W, c.C, c.K, c.size, c.threads).bytes;
       }},
      {"norm_relu_conv3x3_backward",
       [](const Call& c) {
         return cpu::Conv3x3Backward(c.N, c.H, c.W, c.C, c.K, c.size, c.threads).bytes;
       }},
      {"transition_forward",
       [](const Call& c) {
         return cpu::ProductForward(c.pooled_rows(), c.C, c.K, c.size, c.threads).bytes;
       }},
      {"transition_backward",
       [](const Call& c) {  // the correction stays while dx is written
         return cpu::ProductBackward(c.pooled_rows(), c.C, c.K, c.size, c.threads).bytes +
                cpu::transition_correction_bytes(c.C, c.size);
       }},
      {"stem_forward",
       [](const Call& c) { return cpu::Stem(c.N, c.H, c.W, c.C, c.size, c.threads).bytes; }},
      {"stem_backward",
       [](const Call& c) { return cpu::Stem(c.N, c.H, c.W, c.C, c.size, c.threads).bytes; }},
  };
  return sizes;
}

// Partial results of a reduction over rows: two numbers for each channel and a count, per block.
inline int64_t column_partials(int64_t blocks, const Call& c) {
  return blocks * (2 * c.C + 1) * (c.size == 8 ? 8 : 4);
}

inline Columns columns(int64_t rows, const Call& c, int64_t widest, int loads) {
  return Columns(rows, c.C, vector_width(c.C, c.size, widest, {}), c.size, loads);
}

inline const Sizes& cuda_sizes() {
  static const auto conv3x3_blocks = [](const Call& c) {
    return cuda::conv3x3_blocks(c.rows(), c.multiprocessors());
  };
  static const auto stem = [](const Call& c) {
    const int64_t lanes = columns(1, c, c.size == 8 ? 2 : 4, 1).lanes;
    return column_partials(c.N * ceil_div(ceil_div(c.W, 2), lanes) + 512, c);
  };
  static const Sizes sizes = {
      {"channel_stats",
       [](const Call& c) {
         return column_partials(columns(c.rows(), c, 16 / c.size, 8).parts, c);
       }},
      {"norm_relu_conv1x1_forward",
       [](const Call& c) {
         return cuda::Conv1x1Forward(c.rows(), c.K, c.multiprocessors()).bytes;
       }},
      {"norm_relu_conv1x1_backward",
       [](const Call& c) {
         const int64_t most = cuda::Conv1x1Backward::max_outputs(c.size);
         return cuda::Conv1x1Backward(c.rows(), c.C, std::min(c.K, most), c.size,
                                      c.multiprocessors())
             .bytes;
       }},
      {"norm_relu_conv3x3_forward",
       [](const Call& c) {
         return cuda::conv3x3_weight_bytes(c.K, c.C, c.size) + conv3x3_blocks(c) * 3 * c.K * 4;
       }},
      {"norm_relu_conv3x3_backward",
       [](const Call& c) {
         const cuda::Conv3x3WeightGradient split(c.C, c.K);
         const int64_t row_blocks = split.row_blocks(c.rows(), c.multiprocessors());
         return cuda::conv3x3_weight_bytes(c.K, c.C, c.size) +
                row_blocks * 9 * c.K * split.pitch() * 4 +
                conv3x3_blocks(c) * 2 * round_up(c.C, 64) * 4;
       }},
      {"transition_forward",
       [](const Call& c) {
         return std::min<int64_t>(ceil_div(c.pooled_rows(), 64), 2 * c.multiprocessors()) * 3 *
                c.K * 4;
       }},
      {"transition_backward",
       [](const Call& c) {  // the norm's sums beside the weight gradient's partial sums
         const int64_t tiles = std::max<int64_t>(1, ceil_div(c.C, 128) * ceil_div(c.K, 128));
         const int64_t blocks = std::max<int64_t>(1, 2 * c.multiprocessors() / tiles);
         const int64_t parts = columns(c.pooled_rows(), c, 4, 4).parts;
         return column_partials(parts, c) + blocks * c.K * round_up(c.C, 2) * 4;
       }},
      {"stem_forward", stem},
      {"stem_backward", stem},
  };
  return sizes;
}

}  // namespace densenet_efficient::workspace
