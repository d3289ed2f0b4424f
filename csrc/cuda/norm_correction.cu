// norm_correction: the deferred part of a norm's gradient, as per-channel vectors; and its use.
//
//   p = scale * dbeta / count, q = scale * rstd * dgamma / count    (0 for constant statistics)
//   dx = a * dx - p - (x - mean) * q                                 (norm_correction_apply)
//
// norm_correction: one thread per channel, in double, rounded once.
// norm_correction_apply: a thread owns V neighbouring channels, whose correction it keeps in
// registers, and every lanes-th row of its block's part (columns.h), kLoads rows in flight. 16-bit
// results are dithered (dither.h).
// Bytes moved: x once, dx twice (read and written), the correction once per block.
#include "../dither.h"
#include "columns.h"
#include "launch.h"
#include "vector.cuh"

namespace densenet_efficient {
namespace {

constexpr int kThreads = 128;
constexpr int kLoads = 4;  // of x and of dx each

template <typename A>
__global__ void __launch_bounds__(kThreads)
    norm_correction_kernel(Rows<const A> dnorm, Rows<const A> norm, int64_t count, bool accumulate,
                           int channels, Rows<A> correction) {
  using namespace device;
  const int c = block_x() * kThreads + thread_index();
  if (c >= channels) return;
  const A scale = global_load<A>(norm[kScale] + c);
  const double share = count > 0 ? double(scale) / double(count) : 0.0;
  double p = 0.0, q = 0.0;
  if (count > 0) {
    p = share * global_load<A>(dnorm[kDbeta] + c);
    q = share * global_load<A>(norm[kRstd] + c) * global_load<A>(dnorm[kDgamma] + c);
  }
  if (accumulate) {
    p += global_load<A>(correction[kP] + c);
    q += global_load<A>(correction[kQ] + c);
  } else {
    global_store(correction[kA] + c, scale);
    global_store(correction[kCenter] + c, global_load<A>(norm[kMean] + c));
  }
  global_store(correction[kP] + c, A(p));
  global_store(correction[kQ] + c, A(q));
}

void norm_correction(Tensor dnorm, Tensor norm, int64_t count, bool accumulate, Tensor correction) {
  const char* op = "norm_correction";
  check_dim({op, "norm", norm}, 2);
  const int64_t channels = norm.size(1);
  const ScalarType dtype = norm.scalar_type();
  if (dtype != ScalarType::Double) check_dtype({op, "norm", norm}, ScalarType::Float);
  const int64_t norm_stride =
      check_table({op, "norm", norm}, kNormRows, channels, dtype, norm, "norm");
  const int64_t dnorm_stride =
      check_table({op, "dnorm", dnorm}, kDnormRows, channels, dtype, norm, "norm");
  check_dim({op, "correction", correction}, 2);
  const int64_t width = correction.size(1);
  if (accumulate ? width < channels : width != channels)
    fail({op, "correction", correction}, "must have ", accumulate ? "at least " : "", channels,
         " columns, got ", width);
  const int64_t correction_stride =
      check_table({op, "correction", correction}, kCorrectionRows, width, dtype, norm, "norm");
  if (count < 0) fail({op, "count", norm}, "must not be negative, got ", count);
  if (channels == 0) return;
  const Launcher launcher(op, norm);
  dispatch_arithmetic(dtype, [&]<typename A>(A) {
    launcher.launch<&norm_correction_kernel<A>>(
        {.grid_x = ceil_div(channels, kThreads), .block = kThreads},
        input_rows<A>(dnorm, dnorm_stride), input_rows<A>(norm, norm_stride), count, accumulate,
        static_cast<int>(channels), output_rows<A>(correction, correction_stride));
  });
}

template <typename T, int V>
__global__ void __launch_bounds__(kColumnThreads, 2)
    apply_kernel(Rows<T> dx, Rows<const T> x, Rows<const Arithmetic<T>> correction, Columns plan) {
  using A = Arithmetic<T>;
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
  const char* op = "norm_correction_apply";
  check_dim({op, "x", x}, 2);
  const int64_t rows = x.size(0), channels = x.size(1);
  const ScalarType accumulate = check_activation_dtype({op, "x", x});
  const int64_t x_stride = check_rows({op, "x", x});
  const int64_t dx_stride = check_activation({op, "dx", dx}, {rows, channels}, x, "x");
  const int64_t stride =
      check_table({op, "correction", correction}, kCorrectionRows, channels, accumulate, x, "x");
  if (rows == 0 || channels == 0) return;
  const Launcher launcher(op, x);
  dispatch_activation({op, "x", x}, [&]<typename T>(T) {
    const int width =
        vector_width(channels, sizeof(T), 16 / sizeof(T),
                     {{x.const_data_ptr(), x_stride}, {dx.const_data_ptr(), dx_stride}});
    const Columns plan(rows, channels, width, sizeof(T), kLoads);
    dispatch_width<16 / sizeof(T)>(width, [&]<int V>() {
      launcher.launch<&apply_kernel<T, V>>(
          {.grid_x = plan.parts, .grid_y = plan.groups, .block = kColumnThreads},
          output_rows<T>(dx, dx_stride), input_rows<T>(x, x_stride),
          input_rows<Arithmetic<T>>(correction, stride), plan);
    });
  });
}

}  // namespace
}  // namespace densenet_efficient

DE_REGISTER(library) {
  library.impl("norm_correction", TORCH_BOX(&densenet_efficient::norm_correction));
  library.impl("norm_correction_apply", TORCH_BOX(&densenet_efficient::norm_correction_apply));
}
