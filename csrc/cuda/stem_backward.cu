// stem, backward: from dy [N, OH, OW, C] to dx [N, H, W, C], through the max-pool, the ReLU and the
// norm.
//
//   dz goes to the window's first maximum (row-major); dx = a * dz - p - (x - mean) * q
//
// Two passes over x and dy, cheaper than storing dz in between: the sums need only each window's
// maximum; then dx gathers, for each of a thread's two input columns, from the thread's own window
// and from its right neighbour's, by their winners' positions, exchanged in shared memory. Blocks
// of the second pass compute one column and one row of windows more than they own.
//
// Who owns what: pool/stem.cuh. Bytes moved: x twice (its columns asked for 1.5 times), dy twice
// (in the second pass twice over), dx once, two partial sums per channel and block. Sums in fixed
// order (reduce/finish.cuh).
#include "pool/stem.cuh"
#include "reduce/block.cuh"
#include "reduce/correction.cuh"
#include "reduce/finish.cuh"
#include "workspace.h"

namespace densenet_efficient {
namespace {

template <typename T, int V>
__global__ void __launch_bounds__(kColumnThreads, 2)
    stem_backward_sums_kernel(Rows<const T> dy, Rows<const T> x, Rows<const Arithmetic<T>> norm,
                              StemTiling plan, Arithmetic<T>* partials) {
  using A = Arithmetic<T>;
  const StemThread at(plan);
  Pairs<A, V> sums = Pairs<A, V>::zero();
  const auto input = [](int, A x) { return x; };
  if (at.active) {
    A scale[V], shift[V], mean[V], rstd[V];
    load_values(norm[kScale] + at.channel, scale);
    load_values(norm[kShift] + at.channel, shift);
    load_values(norm[kMean] + at.channel, mean);
    InputRow<T, V> middle, below;
    below.load(x, plan, at, 2 * at.first - 1);
    auto above = row_maximum<T, A>(below, scale, shift, input);
#pragma unroll 2
    for (int row = at.first; row < at.end; ++row) {
      const int64_t pixel = (at.image * plan.out_height + row) * plan.out_width + at.column;
      const Vector<T, V> gradient = load_input<T, V>(dy[pixel] + at.channel);
      middle.load(x, plan, at, 2 * row);
      below.load(x, plan, at, 2 * row + 1);
      auto window = above;
      const auto centre = row_maximum<T, A>(middle, scale, shift, input);
      above = row_maximum<T, A>(below, scale, shift, input);
      A dz[V];
      unpack(gradient, dz);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        window.offer(v, centre.value[v], centre.tag[v]);
        window.offer(v, above.value[v], above.tag[v]);
        const A masked = relu_mask(dz[v], window.value[v]);
        sums.first[v] += masked * (window.tag[v] - mean[v]);
        sums.second[v] += masked;
      }
    }
    load_values(norm[kRstd] + at.channel, rstd);
#pragma unroll
    for (int v = 0; v < V; ++v) sums.first[v] *= rstd[v];
  }
  block_merge<MergeSums>(plan.columns, at.at, sums, partials);
}

// A window's winner is its position 3 * row + column, or kNone.
constexpr int kNone = 15;

template <int V>
struct Winners {
  uint8_t position[V];
};

template <typename T, int V>
__global__ void __launch_bounds__(kColumnThreads, 2)
    stem_backward_dx_kernel(Rows<const T> dy, Rows<const T> x, Rows<const Arithmetic<T>> norm,
                            Rows<const Arithmetic<T>> dnorm, int64_t count, StemTiling plan,
                            Rows<T> dx) {
  using A = Arithmetic<T>;
  using Bytes = typename Raw<V>::type;
  using namespace device;
  const StemThread at(plan);
  const int thread = thread_index(), right = thread + plan.columns.group_vectors;
  Bytes* const exchange = reinterpret_cast<Bytes*>(shared_memory());  // [2][threads]
  const int safe_channel = at.active ? at.channel : 0;
  const Correction<A, V> correction(norm, dnorm, count, safe_channel);
  A shift[V];
  load_values(norm[kShift] + safe_channel, shift);

  const auto offset = [](int i, A) { return i; };
  InputRow<T, V> middle, below;
  below.load(x, plan, at, 2 * at.first - 1);
  auto above = row_maximum<T, int>(below, correction.a, shift, offset);
  // Of the window above: winners and gradients, the thread's own and its right neighbour's.
  Winners<V> own_before, right_before;
  A dy_own_before[V], dy_right_before[V];
#pragma unroll
  for (int v = 0; v < V; ++v) {
    own_before.position[v] = right_before.position[v] = kNone;
    dy_own_before[v] = dy_right_before[v] = A(0);
  }

  // One row of windows more than the band owns: it takes part in the band's last input row.
  for (int row = at.first; row <= at.end; ++row) {
    const int64_t pixel = (at.image * plan.out_height + row) * plan.out_width + at.column;
    const bool window = at.active && row < plan.out_height;
    const bool window_right = at.owner && window && at.column + 1 < plan.out_width;
    auto gradient = Vector<T, V>::zero(), gradient_right = Vector<T, V>::zero();
    if (window) gradient = load_input<T, V>(dy[pixel] + at.channel);
    if (window_right) gradient_right = load_input<T, V>(dy[pixel + 1] + at.channel);
    const Vector<T, V> x_above[2] = {below.x[1], below.x[2]};
    const bool above_present[2] = {below.present[1], below.present[2]};
    middle.load(x, plan, at, 2 * row);
    below.load(x, plan, at, 2 * row + 1);

    const auto centre = row_maximum<T, int>(middle, correction.a, shift, offset);
    const auto next = row_maximum<T, int>(below, correction.a, shift, offset);
    Winners<V> own, other;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      above.offer(v, centre.value[v], 3 + centre.tag[v]);
      above.offer(v, next.value[v], 6 + next.tag[v]);
      const bool passes = window && !(above.value[v] <= A(0));
      own.position[v] = static_cast<uint8_t>(passes ? above.tag[v] : kNone);
      other.position[v] = kNone;
    }
    above = next;
    Bytes bytes;
    memcpy(&bytes, &own, V);
    Bytes* const slot = exchange + (row & 1) * kColumnThreads;
    shared_store(slot + thread, bytes);
    sync_threads();
    if (window_right) {
      bytes = shared_load<Bytes>(slot + right);
      memcpy(&other, &bytes, V);
    }

    A dy_own[V], dy_right[V];
    unpack(gradient, dy_own);
    unpack(gradient_right, dy_right);
    const auto emit = [&](int input_row, int i, const Vector<T, V>& input, const A(&dz)[V]) {
      const int64_t to = (at.image * plan.height + input_row) * plan.width + 2 * at.column + i;
      A value[V];
      unpack(input, value);
#pragma unroll
      for (int v = 0; v < V; ++v) value[v] = correction.apply(dz[v], value[v], v);
      store_vector(dx[to] + at.channel, pack<T, V>(value));
    };
    if (at.owner && row > at.first) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (!above_present[i]) continue;
        A dz[V];
#pragma unroll
        for (int v = 0; v < V; ++v) {
          dz[v] = own_before.position[v] == 7 + i ? dy_own_before[v] : A(0);
          if (i == 1) dz[v] += right_before.position[v] == 6 ? dy_right_before[v] : A(0);
          dz[v] += own.position[v] == 1 + i ? dy_own[v] : A(0);
          if (i == 1) dz[v] += other.position[v] == 0 ? dy_right[v] : A(0);
        }
        emit(2 * row - 1, i, x_above[i], dz);
      }
    }
    if (at.owner && row < at.end) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (!middle.present[1 + i]) continue;
        A dz[V];
#pragma unroll
        for (int v = 0; v < V; ++v) {
          dz[v] = own.position[v] == 4 + i ? dy_own[v] : A(0);
          if (i == 1) dz[v] += other.position[v] == 3 ? dy_right[v] : A(0);
        }
        emit(2 * row, i, middle.x[1 + i], dz);
      }
    }
    own_before = own;
    right_before = other;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      dy_own_before[v] = dy_own[v];
      dy_right_before[v] = dy_right[v];
    }
  }
}

template <typename A>
__global__ void __launch_bounds__(kSumThreads, 2)
    stem_backward_finish_kernel(SumPartials<A> none, SumPartials<A> norm) {
  finish_sums<1>(none, norm);
}

void stem_backward(Tensor dy, Tensor x, Tensor norm, int64_t count, Tensor dx, Tensor dnorm) {
  const arguments::StemBackward call(dy, x, norm, count, dx, dnorm);
  check_two_dimensional(call);
  if (call.C == 0) return;
  const Launcher launcher(call.lead);
  dispatch_activation(x.scalar_type(), [&]<typename T>(T) {
    using A = Arithmetic<T>;
    const Rows<A> dnorm_rows = output_rows<A>(call.dnorm);
    if (call.N * call.H * call.W == 0) return clear_table(launcher, dnorm_rows, kDnormRows, call.C);
    const tiling::StemBackward tiling(call.N, call.H, call.W, call.C, sizeof(T),
                                      row_alignment({call.x, call.dy, call.dx}));
    const StemTiling &plan = tiling.sums, &wide = tiling.dx;
    const Workspace partials(x, tiling.bytes);
    const Rows<const T> dy_rows = input_rows<T>(call.dy), x_rows = input_rows<T>(call.x);
    const Rows<const A> norm_rows = input_rows<A>(call.norm);
    constexpr int kMaxVector = StemTiling::max_vector(sizeof(T));
    dispatch_width<kMaxVector>(plan.columns.vector, [&]<int V>() {
      launcher.launch<&stem_backward_sums_kernel<T, V>>(
          {.grid_x = plan.parts(),
           .grid_y = plan.columns.groups,
           .block = kColumnThreads,
           .shared_bytes = kMergeBytes<MergeSums, A, V>},
          dy_rows, x_rows, norm_rows, plan, partials.data<A>());
    });
    launch_finish<&stem_backward_finish_kernel<A>, 1>(
        launcher, SumPartials<A>{},
        norm_sums<A>(partials.data<const A>(), plan.parts(), call.C, call.C, dnorm_rows));
    dispatch_width<kMaxVector>(wide.columns.vector, [&]<int V>() {
      launcher.launch<&stem_backward_dx_kernel<T, V>>({.grid_x = wide.parts(),
                                                       .grid_y = wide.columns.groups,
                                                       .block = kColumnThreads,
                                                       .shared_bytes = 2 * kColumnThreads * V},
                                                      dy_rows, x_rows, norm_rows,
                                                      input_rows<A>(call.dnorm), call.count, wide,
                                                      output_rows<T>(call.dx));
    });
  });
}

}  // namespace
}  // namespace densenet_efficient

DE_REGISTER(library) {
  library.impl("stem_backward", TORCH_BOX(&densenet_efficient::stem_backward));
}
