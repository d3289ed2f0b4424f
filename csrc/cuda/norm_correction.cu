// norm_correction: the deferred part of a norm's gradient, as per-channel vectors; and its use.
//
//   p = scale * dbeta / count, q = scale * rstd * dgamma / count    (0 for constant statistics)
//   dx = a * dx - p - (x - mean) * q                                 (norm_correction_apply)
//
// norm_correction: one thread per channel, in double, rounded once.
// norm_correction_apply: a thread owns V neighbouring channels, whose correction it keeps in
// registers, and every lanes-th row of its block's part (tiling/columns.h), kLoads rows in flight.
// 16-bit results are dithered (dither.h).
// Bytes moved: x once, dx twice (read and written), the correction once per block.
#include "../dither.h"
#include "launch.h"
#include "reduce/tables.cuh"
#include "tiling/columns.h"
#include "vector.cuh"

namespace densenet_efficient {
namespace {

using Tiling = tiling::NormCorrectionApply;
using tiling::Columns, tiling::ColumnThread, tiling::kColumnThreads;

constexpr int kThreads = 128;

template <typename A>
__global__ void __launch_bounds__(kThreads)
    norm_correction_kernel(Rows<const A> dnorm, NormCorrection<A> args, int channels) {
  using namespace device;
  const int c = block_x() * kThreads + thread_index();
  if (c >= channels) return;
  store_correction(args, kDbeta, c, global_load<A>(dnorm[kDbeta] + c));
  store_correction(args, kDgamma, c, global_load<A>(dnorm[kDgamma] + c));
}

void norm_correction(Tensor dnorm, Tensor norm, int64_t count, bool accumulate, Tensor correction) {
  const arguments::NormCorrection call(dnorm, norm, count, accumulate, correction);
  if (call.C == 0) return;
  const Launcher launcher(call.lead);
  dispatch_arithmetic(call.arithmetic, [&]<typename A>(A) {
    launcher.launch<&norm_correction_kernel<A>>(
        {.grid_x = ceil_div(call.C, kThreads), .block = kThreads}, input_rows<A>(call.dnorm),
        NormCorrection<A>{input_rows<A>(call.norm), output_rows<A>(call.correction), call.count,
                          accumulate},
        static_cast<int>(call.C));
  });
}

template <typename T, int V>
__global__ void __launch_bounds__(kColumnThreads, 2)
    norm_correction_apply_kernel(Rows<T> dx, Rows<const T> x, Rows<const Arithmetic<T>> correction,
                                 Columns plan) {
  using A = Arithmetic<T>;
  constexpr int kLoads = Tiling::kLoads;
  const ColumnThread at(plan, device::thread_index(), device::block_y());
  if (!at.active) return;
  A a[V], p[V], q[V], mean[V];
  load_values(correction[kA] + at.channel, a);
  load_values(correction[kP] + at.channel, p);
  load_values(correction[kQ] + at.channel, q);
  load_values(correction[kCenter] + at.channel, mean);
  const int64_t first = device::block_x() * plan.part_rows;
  const int64_t end = first + plan.part_rows < plan.rows ? first + plan.part_rows : plan.rows;
  const int64_t step = int64_t(plan.lanes) * kLoads;
  for (int64_t base = first + at.lane; base < end; base += step) {
    Vector<T, V> gradients[kLoads], inputs[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int64_t row = base + int64_t(i) * plan.lanes;
      if (row < end) {
        gradients[i] = load_vector<T, V>(dx[row] + at.channel);
        inputs[i] = load_input<T, V>(x[row] + at.channel);
      }
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int64_t row = base + int64_t(i) * plan.lanes;
      if (row >= end) break;
      const auto index = static_cast<uint32_t>(row * plan.channels + at.channel);
      A dz[V], value[V];
      unpack(gradients[i], dz);
      unpack(inputs[i], value);
#pragma unroll
      for (int v = 0; v < V; ++v)
        dz[v] = dithered_as<T>(correct(dz[v], value[v], a[v], p[v], q[v], mean[v]), index + v);
      store_vector(dx[row] + at.channel, pack<T, V>(dz));
    }
  }
}

void norm_correction_apply(Tensor dx, Tensor x, Tensor correction) {
  const arguments::NormCorrectionApply call(dx, x, correction);
  if (call.M == 0 || call.C == 0) return;
  const Launcher launcher(call.lead);
  dispatch_activation(x.scalar_type(), [&]<typename T>(T) {
    const Columns plan =
        Tiling(call.M, call.C, sizeof(T), row_alignment({call.x, call.dx})).columns;
    dispatch_width<16 / sizeof(T)>(plan.vector, [&]<int V>() {
      launcher.launch<&norm_correction_apply_kernel<T, V>>(
          {.grid_x = plan.parts, .grid_y = plan.groups, .block = kColumnThreads},
          output_rows<T>(call.dx), input_rows<T>(call.x),
          input_rows<Arithmetic<T>>(call.correction), plan);
    });
  });
}

}  // namespace
}  // namespace densenet_efficient

DE_REGISTER(library) {
  library.impl("norm_correction", TORCH_BOX(&densenet_efficient::norm_correction));
  library.impl("norm_correction_apply", TORCH_BOX(&densenet_efficient::norm_correction_apply));
}
