// The scratch of every operator by name and shape, for the memory plan. The sizes are those of the
// tilings (cpu/tiling.h, cuda/tiling), by which the launchers allocate.
#pragma once

#include <functional>
#include <map>
#include <string>

#include "cpu/tiling.h"
#include "cuda/tiling/columns.h"
#include "cuda/tiling/conv1x1.h"
#include "cuda/tiling/conv3x3.h"
#include "cuda/tiling/pool.h"
#include "cuda/tiling/stem_conv.h"
#include "image.h"

namespace densenet_efficient {

// The shape of a call. A row tensor [M, C] is N = M images of one pixel.
struct CallShape {
  Image x;
  int64_t C, K;  // channels of x and of y, 0 where y is no product

  int64_t rows() const { return x.pixels(); }
  int64_t windows() const { return x.halved().pixels(); }  // that a transition pools
  tiling::Images3x3 images() const { return {x.N, x.H, x.W}; }
};

// What else decides about the scratch of a CPU operator.
struct CpuCall : CallShape {
  int64_t size;  // bytes of an element of the arithmetic
  int64_t threads;
};

// The same of a CUDA operator.
struct CudaCall : CallShape {
  int64_t size;  // bytes of an element of an activation
  tiling::Device device;
  int64_t alignment;     // of the rows of all activations, in bytes; more than 16 count as 16
  bool packed_weight;    // a 3x3 weight has its channels as neighbours
  bool accumulate;       // of norm_relu_conv3x3_backward
  bool optional_output;  // stats or dweight is wanted
};

// The most bytes that an operator holds at a time; operators without an entry allocate nothing.
template <typename Call>
using WorkspaceSizes = std::map<std::string, std::function<int64_t(const Call&)>>;

inline const WorkspaceSizes<CpuCall>& cpu_workspaces() {
  namespace tiling = cpu::tiling;
  static const auto forward = [](int64_t rows, const CpuCall& c) {
    return tiling::allocation_bytes(
        tiling::ProductForward(rows, c.C, c.K, c.size, c.threads).bytes);
  };
  static const auto backward = [](int64_t rows, const CpuCall& c) {
    return tiling::allocation_bytes(
        tiling::ProductBackward(rows, c.C, c.K, c.size, c.threads).bytes);
  };
  static const auto stem = [](const CpuCall& c) {
    return tiling::allocation_bytes(tiling::Stem(c.x, c.C, c.size, c.threads).bytes);
  };
  static const WorkspaceSizes<CpuCall> sizes = {
      {"channel_stats",
       [](const CpuCall& c) {
         return tiling::allocation_bytes(
             tiling::ChannelStats(c.rows(), c.C, c.size, c.threads).bytes);
       }},
      {"norm_relu_conv1x1_forward", [](const CpuCall& c) { return forward(c.rows(), c); }},
      {"norm_relu_conv1x1_backward", [](const CpuCall& c) { return backward(c.rows(), c); }},
      {"norm_relu_conv3x3_forward",
       [](const CpuCall& c) {
         return tiling::allocation_bytes(
             tiling::Conv3x3Forward(c.x, c.C, c.K, c.size, c.threads).bytes);
       }},
      {"norm_relu_conv3x3_backward",
       [](const CpuCall& c) {
         return tiling::allocation_bytes(
             tiling::Conv3x3Backward(c.x, c.C, c.K, c.size, c.threads).bytes);
       }},
      {"transition_forward", [](const CpuCall& c) { return forward(c.windows(), c); }},
      {"transition_backward",
       [](const CpuCall& c) {  // the correction is live while dx is written
         return backward(c.windows(), c) +
                tiling::allocation_bytes(tiling::transition_correction_bytes(c.C, c.size));
       }},
      {"stem_forward", stem},
      {"stem_backward", stem},
  };
  return sizes;
}

inline const WorkspaceSizes<CudaCall>& cuda_workspaces() {
  static const WorkspaceSizes<CudaCall> sizes = {
      {"channel_stats",
       [](const CudaCall& c) {
         return tiling::ChannelStats(c.rows(), c.C, c.size, c.alignment).bytes;
       }},
      {"norm_relu_conv1x1_forward",
       [](const CudaCall& c) {
         return tiling::NormReluConv1x1Forward(c.rows(), c.C, c.K, c.size, c.optional_output,
                                               c.device)
             .bytes;
       }},
      {"norm_relu_conv1x1_backward",
       [](const CudaCall& c) {
         return tiling::NormReluConv1x1Backward::workspace_bytes(c.rows(), c.C, c.K, c.size,
                                                                 c.device);
       }},
      {"norm_relu_conv3x3_forward",
       [](const CudaCall& c) {
         return tiling::NormReluConv3x3Forward(c.images(), c.C, c.K, c.size, !c.packed_weight,
                                               c.optional_output, c.device)
             .bytes();
       }},
      {"norm_relu_conv3x3_backward",
       [](const CudaCall& c) {
         return tiling::NormReluConv3x3Backward(c.images(), c.C, c.K, c.size, c.accumulate,
                                                !c.packed_weight, c.optional_output, c.device)
             .bytes();
       }},
      {"transition_forward",
       [](const CudaCall& c) {
         return tiling::TransitionForward(c.windows(), c.K, c.optional_output, c.device).bytes;
       }},
      {"transition_backward",
       [](const CudaCall& c) {
         return tiling::TransitionBackward(c.windows(), c.C, c.K, c.size, c.alignment,
                                           c.optional_output, c.device)
             .bytes();
       }},
      {"stem_forward",
       [](const CudaCall& c) {
         return tiling::StemForward(c.x.N, c.x.H, c.x.W, c.C, c.size, c.alignment,
                                    c.optional_output)
             .bytes;
       }},
      {"stem_backward",
       [](const CudaCall& c) {
         return tiling::StemBackward(c.x.N, c.x.H, c.x.W, c.C, c.size, c.alignment).bytes;
       }},
      {"stem_conv_backward_weight",
       [](const CudaCall& c) {
         return tiling::StemConvBackwardWeight(c.x.N, c.x.H, c.x.W, c.C, c.K, c.device).bytes;
       }},
  };
  return sizes;
}

}  // namespace densenet_efficient
