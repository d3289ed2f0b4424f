// transition, backward, from dy [M, K] with M = N * (H/2) * (W/2) windows:
//
//   dpooled = dy @ weight, dz = dpooled / 4 * [a * x + s > 0] for each of a window's four pixels
//   dx = a * dz - p - (x - mean) * q,  dweight = dy^T @ pooled,  dnorm: sums of dz * x_hat and dz
//
// p and q need the sums over all rows, so dx comes last; until then dx's own memory is the scratch:
//   1. product   dpooled into each window's first pixel of dx. Tile: 128 windows x 128 channels, a
//                warp 32 x 128; dy and weight in panels of outputs, two ahead (gemm/panel.cuh).
//   2. sums      x and dpooled once; the pooled activations into the window's second pixel. A
//                thread owns V channels and walks over windows (tiling/columns.h); sums in fixed
//                order (reduce/finish.cuh).
//   3. dweight   dy^T @ pooled. Tile: 128 outputs x 128 channels, a warp 32 x 128, over a static
//                range of windows; fp32 partials in a workspace, summed in fixed order
//                (reduce/finish.cuh).
//   4. dx        x and dpooled once, dx written once; pixels on a dropped odd edge have dz = 0.
// Bytes, with X = N * H * W * C elements of two bytes: 2 X read (x), 3/4 X written and read again,
// 1 X written (dx); dy once per 128 channels and, for dweight, once more; the weight from the L2
// cache.
#include "pool/transition_products.cuh"
#include "reduce/block.cuh"
#include "reduce/correction.cuh"
#include "reduce/finish.cuh"
#include "workspace.h"

namespace densenet_efficient {
namespace {

using namespace transition_products;

// ---- 2. sums, pooled activations ----------------------------------------------------------------

// A window's pixels: present where an odd edge does not cut them off.
template <typename T, int V>
struct Window {
  int64_t corner;
  Vector<T, V> x[kWindowPixels];
  bool present[kWindowPixels];

  __device__ __forceinline__ void load(const Rows<const T>& rows, const PoolWindows& pool,
                                       int window, int channel DE_HERE) {
    corner = pool.corner(window);
    const int row = window / pool.out_width, column = window - row * pool.out_width;
    const bool right = 2 * column + 1 < pool.width;
    const bool below = 2 * (row % pool.out_height) + 1 < pool.height;
#pragma unroll
    for (int i = 0; i < kWindowPixels; ++i) {
      present[i] = (right || !(i & 1)) && (below || i < 2);
      if (present[i]) x[i] = load_input<T, V>(rows[corner + pool.offset(i)] + channel DE_AT);
    }
  }
};

template <typename T, int V>
__global__ void __launch_bounds__(kColumnThreads, 2)
    transition_backward_sums_kernel(Rows<const T> x, Rows<const float> norm, PoolWindows pool,
                                    Columns plan, bool keep_pooled, Rows<T> dx, float* partials) {
  using namespace device;
  const ColumnThread at(plan, thread_index(), block_y());
  auto sums = Pairs<float, V>::zero();
  if (at.active) {
    float scale[V], shift[V], mean[V], rstd[V];
    load_values(norm[kScale] + at.channel, scale);
    load_values(norm[kShift] + at.channel, shift);
    load_values(norm[kMean] + at.channel, mean);
    const int64_t first = block_x() * plan.part_rows;
    const int64_t end = first + plan.part_rows < plan.rows ? first + plan.part_rows : plan.rows;
#pragma unroll 2
    for (int64_t row = first + at.lane; row < end; row += plan.lanes) {
      Window<T, V> window;
      window.load(x, pool, static_cast<int>(row), at.channel);
      T* const own = dx[window.corner] + at.channel;
      float dpooled[V], pooled[V];
      unpack(load_vector<T, V>(own), dpooled);
#pragma unroll
      for (int v = 0; v < V; ++v) pooled[v] = 0.0f;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float left[V], right[V];
        unpack(window.x[2 * half], left);
        unpack(window.x[2 * half + 1], right);
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const float dh = 0.25f * dpooled[v];
          const float z_left = normalise(left[v], scale[v], shift[v]);
          const float z_right = normalise(right[v], scale[v], shift[v]);
          const float dz_left = relu_mask(dh, z_left), dz_right = relu_mask(dh, z_right);
          sums.first[v] += dz_left * (left[v] - mean[v]);
          sums.first[v] += dz_right * (right[v] - mean[v]);
          sums.second[v] += dz_left + dz_right;
          pooled[v] += relu(z_left) + relu(z_right);
        }
      }
#pragma unroll
      for (int v = 0; v < V; ++v) pooled[v] *= 0.25f;
      if (keep_pooled) store_vector(own + dx.stride, pack<T, V>(pooled));
    }
    load_values(norm[kRstd] + at.channel, rstd);
#pragma unroll
    for (int v = 0; v < V; ++v) sums.first[v] *= rstd[v];
  }
  block_merge<MergeSums>(plan, at, sums, partials);
}

// ---- 4. dx --------------------------------------------------------------------------------------

template <typename T, int V>
__global__ void __launch_bounds__(kColumnThreads, 2)
    transition_backward_dx_kernel(Rows<const T> x, Rows<const float> norm, Rows<const float> dnorm,
                                  int64_t count, PoolWindows pool, Columns plan, Rows<T> dx) {
  using namespace device;
  const ColumnThread at(plan, thread_index(), block_y());
  if (!at.active) return;
  const Correction<float, V> correction(norm, dnorm, count, at.channel);
  float shift[V];
  load_values(norm[kShift] + at.channel, shift);
  const int64_t first = block_x() * plan.part_rows;
  const int64_t end = first + plan.part_rows < plan.rows ? first + plan.part_rows : plan.rows;
  for (int64_t row = first + at.lane; row < end; row += plan.lanes) {
    Window<T, V> window;
    window.load(x, pool, static_cast<int>(row), at.channel);
    T* const own = dx[window.corner] + at.channel;
    const bool whole = window.present[kWindowPixels - 1];
    auto stored = Vector<T, V>::zero();
    if (whole) stored = load_vector<T, V>(own);
    float dpooled[V];
    unpack(stored, dpooled);
#pragma unroll
    for (int i = 0; i < kWindowPixels; ++i) {
      if (!window.present[i]) continue;
      float value[V];
      unpack(window.x[i], value);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const float z = normalise(value[v], correction.a[v], shift[v]);
        value[v] = correction.apply(relu_mask(0.25f * dpooled[v], z), value[v], v);
      }
      store_vector(own + pool.offset(i) * dx.stride, pack<T, V>(value));
    }
  }
}

// ---- Second pass of 2 and 3 ---------------------------------------------------------------------

__global__ void __launch_bounds__(kSumThreads, 2)
    transition_backward_finish_kernel(SumPartials<float> weight, SumPartials<float> norm) {
  finish_sums<1>(weight, norm);
}

// ---- Launcher -----------------------------------------------------------------------------------

void transition_backward(Tensor dy, Tensor x, Tensor norm, Tensor weight, int64_t count, Tensor dx,
                         OptionalTensor dweight, Tensor dnorm) {
  const arguments::TransitionBackward call(dy, x, norm, weight, count, dx, dweight, dnorm);
  check_two_dimensional(call);
  dispatch_operands(call.lead, [&]<typename T>(T) {
    const int64_t C = call.C, K = call.K;
    const auto weight_tensor = weight_rows(call);
    const PoolWindows pool(call, true), every_window(call, false);
    const Launcher launcher(call.lead);
    const Rows<float> dnorm_rows = output_rows<float>(call.dnorm);
    const Rows<float> dweight_rows = output_rows<float>(call.dweight);
    if (pool.windows == 0 || C == 0) {
      clear_table(launcher, dnorm_rows, kDnormRows, C);
      if (dweight) clear_table(launcher, dweight_rows, K, C);
    }
    if (every_window.windows == 0 || C == 0) return;
    const Tiling tiling(pool.windows, C, K, sizeof(T), row_alignment({call.x, call.dx}),
                        dweight.has_value(), launcher.device());
    const Rows<const T> x_rows = input_rows<T>(call.x);
    const Rows<T> dx_rows = output_rows<T>(call.dx);
    const Rows<const float> norm_rows = input_rows<float>(call.norm);
    if (pool.windows > 0) {
      launcher.launch<&transition_backward_product_kernel<T>>(
          {.grid_x = ceil_div(pool.windows, kTile),
           .grid_y = ceil_div(C, kTile),
           .block = kThreads,
           .shared_bytes = kProductBytes},
          Product{row_tensor(call.dy), weight_tensor, output_row_tensor(call.dx), pool,
                  static_cast<int>(C), static_cast<int>(K)});
      const Columns& plan = tiling.sums;
      const Workspace sums(x, tiling.sums_bytes), weights(x, tiling.weight_bytes);
      dispatch_width<Tiling::kSumsVector>(plan.vector, [&]<int V>() {
        launcher.launch<&transition_backward_sums_kernel<T, V>>(
            {.grid_x = plan.parts,
             .grid_y = plan.groups,
             .block = kColumnThreads,
             .shared_bytes = kMergeBytes<MergeSums, float, V>},
            x_rows, norm_rows, pool, plan, dweight.has_value(), dx_rows, sums.data<float>());
      });
      SumPartials<float> of_weight;
      if (dweight && K > 0) {
        launcher.launch<&transition_backward_weight_kernel<T>>(
            {.grid_x = tiling.weight_blocks,
             .grid_y = tiling.tiles,
             .block = kThreads,
             .shared_bytes = kStages * kStageBytes},
            Weight{row_tensor(call.dy), output_row_tensor(call.dx), pool, weights.data<float>(),
                   tiling.pitch, static_cast<int>(C), static_cast<int>(K),
                   static_cast<int>(tiling.channel_tiles)});
        of_weight = weight_sums(weights.data<const float>(), tiling.weight_blocks, K, C, 1,
                                tiling.pitch, dweight_rows.data);
      }
      launch_finish<&transition_backward_finish_kernel, 1>(
          launcher, of_weight, norm_sums(sums.data<const float>(), plan.parts, C, C, dnorm_rows));
    }
    const Columns plan(every_window.windows, C, tiling.vector, sizeof(T), Tiling::kLoads);
    dispatch_width<16 / sizeof(T)>(plan.vector, [&]<int V>() {
      launcher.launch<&transition_backward_dx_kernel<T, V>>(
          {.grid_x = plan.parts, .grid_y = plan.groups, .block = kColumnThreads}, x_rows, norm_rows,
          input_rows<float>(call.dnorm), call.count, every_window, plan, dx_rows);
    });
  });
}

}  // namespace
}  // namespace densenet_efficient

DE_REGISTER(library) {
  library.impl("transition_backward", TORCH_BOX(&densenet_efficient::transition_backward));
}
