// stem: norm, ReLU and max-pool (3 x 3, stride 2, padding 1) of x [N, H, W, C] in one pass.
//
//   y = max over the window of relu(a * x + s)   [N, OH, OW, C], OH = ceil(H/2), OW = ceil(W/2)
//   dz goes to the window's first maximum (row-major); dx = a * dz - p - (x - mean) * q
//
// A thread owns V neighbouring channels of one output column ow and walks down a band of output
// rows: the maximum of an input row serves two windows, so vertically x is read once; horizontally
// a third of the reads finds the neighbour's column in the L1 cache. A block is (lanes output
// columns) x (vectors of channels) of one band. Padding never wins: the ReLU's values are not
// negative, and zero takes no gradient.
//
// Backward is two passes over x and dy, cheaper than storing dz in between: the sums need only each
// window's maximum; then dx gathers, for each of a thread's two input columns, from the thread's
// own window and from its right neighbour's (by their winners' positions, exchanged in shared
// memory).
//
// Bytes moved (x: the elements of x, y a quarter): forward x + y; backward 3 x + 2 y; partial sums.
// Moments of y by exact two-pass over kGroup rows, merged by Chan's formula; sums in fixed order.
#include "correction.cuh"
#include "reduce.cuh"

namespace densenet_efficient {
namespace {

constexpr int kGroup = 4;  // output rows whose moments are taken at once
// Eight channels a thread would spill; eight bytes a lane still fill whole sectors.
template <typename T>
constexpr int kVector = sizeof(T) == 8 ? 2 : 4;

// Who owns what. Backward blocks compute one column of windows more than they own.
struct StemPlan {
  int64_t images;
  int height, width, out_height, out_width;
  int halo;        // columns of windows computed beyond the owned ones
  int tiles;       // of owned output columns
  int tile_width;  // owned output columns
  int bands, band_height;
  Columns columns;  // of the channels; its rows are not used

  StemPlan(const Tensor& x, int vector, int halo)
      : images(x.size(0)),
        height(static_cast<int>(x.size(1))),
        width(static_cast<int>(x.size(2))),
        out_height((height + 1) / 2),
        out_width((width + 1) / 2),
        halo(halo),
        columns(1, x.size(3), vector, 1) {
    constexpr int64_t kBlocks = 512;  // enough for every multiprocessor
    constexpr int kShortest = 4;      // a band reads one row more than it owns
    const int widest = columns.lanes > halo ? columns.lanes - halo : 1;
    tiles = static_cast<int>(ceil_div(out_width, widest));
    tile_width = static_cast<int>(ceil_div(out_width, tiles));
    const int64_t wanted = ceil_div(kBlocks, images * tiles * columns.groups);
    bands = static_cast<int>(std::clamp<int64_t>(out_height / kShortest, 1, wanted));
    band_height = static_cast<int>(ceil_div(out_height, bands));
    bands = static_cast<int>(ceil_div(out_height, band_height));
  }
  int64_t parts() const { return images * bands * tiles; }
};

struct StemThread {
  int64_t image;
  int first, end;  // output rows
  int column;      // output column
  int channel;
  bool active;  // has a window column (perhaps the halo's)
  bool owner;
  ColumnThread at;

  __device__ __forceinline__ explicit StemThread(const StemPlan& plan)
      : at(plan.columns, device::thread_index(), device::block_y()) {
    const int tile = device::block_x() % plan.tiles;
    const int rest = device::block_x() / plan.tiles;
    image = rest / plan.bands;
    first = rest % plan.bands * plan.band_height;
    end = min(first + plan.band_height, plan.out_height);
    column = tile * plan.tile_width + at.lane;
    channel = at.channel;
    active = at.active && at.lane < plan.tile_width + plan.halo && column < plan.out_width;
    owner = active && at.lane < plan.tile_width;
  }
};

// Three neighbouring inputs 2 * column - 1 ... of one row; those outside are absent.
template <typename T, int V>
struct InputRow {
  Vector<T, V> x[3];
  bool present[3];

  __device__ __forceinline__ void load(const Rows<const T>& rows, const StemPlan& plan,
                                       const StemThread& at, int row DE_HERE) {
    const bool inside = at.active && row >= 0 && row < plan.height;
    const int64_t pixel = (at.image * plan.height + row) * plan.width + 2 * at.column - 1;
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      const int column = 2 * at.column - 1 + i;
      present[i] = inside && column >= 0 && column < plan.width;
      if (present[i]) x[i] = load_input<T, V>(rows[pixel + i] + at.channel DE_AT);
    }
  }
};

// The first maximum of one input row, or of several: the value behind the ReLU (0 where there is
// none) and the window position or the input it came from.
template <typename A, typename Tag, int V>
struct Maximum {
  A value[V];
  Tag tag[V];

  __device__ __forceinline__ static Maximum none() {
    Maximum maximum;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      maximum.value[v] = A(0);
      maximum.tag[v] = Tag(0);
    }
    return maximum;
  }
  // Later candidates win only where they are larger; a NaN always wins.
  __device__ __forceinline__ void offer(int v, A candidate, Tag candidate_tag) {
    if (candidate > value[v] || candidate != candidate) {
      value[v] = candidate;
      tag[v] = candidate_tag;
    }
  }
};

template <typename T, typename Tag, int V, typename MakeTag>
__device__ __forceinline__ Maximum<Arithmetic<T>, Tag, V> row_maximum(
    const InputRow<T, V>& row, const Arithmetic<T> (&scale)[V], const Arithmetic<T> (&shift)[V],
    MakeTag make_tag) {
  using A = Arithmetic<T>;
  auto maximum = Maximum<A, Tag, V>::none();
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    if (!row.present[i]) continue;
    A x[V];
    unpack(row.x[i], x);
#pragma unroll
    for (int v = 0; v < V; ++v)
      maximum.offer(v, norm_relu(x[v], scale[v], shift[v]), make_tag(i, x[v]));
  }
  return maximum;
}

template <typename T, int V>
__global__ void __launch_bounds__(kColumnThreads, 2)
    stem_forward_kernel(Rows<const T> x, Rows<const Arithmetic<T>> norm, Rows<T> y, StemPlan plan,
                        Arithmetic<T>* partials) {
  using A = Arithmetic<T>;
  const StemThread at(plan);
  Pairs<A, V> pairs = Pairs<A, V>::zero();
  const auto untagged = [](int, A) { return 0; };
  if (at.active) {
    A scale[V], shift[V];
    load_values(norm[kScale] + at.channel, scale);
    load_values(norm[kShift] + at.channel, shift);
    InputRow<T, V> middle, below;
    below.load(x, plan, at, 2 * at.first - 1);
    auto above = row_maximum<T, int>(below, scale, shift, untagged);
    for (int group = at.first; group < at.end; group += kGroup) {
      Vector<T, V> stored[kGroup];
      const int count = min(kGroup, at.end - group);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        const int row = group + i;
        stored[i] = Vector<T, V>::zero();
        if (row >= at.end) continue;
        middle.load(x, plan, at, 2 * row);
        below.load(x, plan, at, 2 * row + 1);
        auto window = row_maximum<T, int>(middle, scale, shift, untagged);
        const auto next = row_maximum<T, int>(below, scale, shift, untagged);
#pragma unroll
        for (int v = 0; v < V; ++v) {
          window.offer(v, above.value[v], 0);
          window.offer(v, next.value[v], 0);
        }
        above = next;
        stored[i] = pack<T, V>(window.value);
        const int64_t pixel = (at.image * plan.out_height + row) * plan.out_width + at.column;
        store_vector(y[pixel] + at.channel, stored[i]);
      }
      if (partials) MergeMoments::merge(pairs, moments_of(stored, count));
    }
  }
  if (partials) block_merge<MergeMoments>(plan.columns, at.at, pairs, partials);
}

template <typename T, int V>
__global__ void __launch_bounds__(kColumnThreads, 2)
    stem_sums_kernel(Rows<const T> dy, Rows<const T> x, Rows<const Arithmetic<T>> norm,
                     StemPlan plan, Arithmetic<T>* partials) {
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

// A window's winner is its position 3 * row + column, or kNobody.
constexpr int kNobody = 15;

template <int V>
struct Winners {
  uint8_t position[V];
};

template <typename T, int V>
__global__ void __launch_bounds__(kColumnThreads, 2)
    stem_gradient_kernel(Rows<const T> dy, Rows<const T> x, Rows<const Arithmetic<T>> norm,
                         Rows<const Arithmetic<T>> dnorm, int64_t count, StemPlan plan,
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
    own_before.position[v] = right_before.position[v] = kNobody;
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
      own.position[v] = static_cast<uint8_t>(passes ? above.tag[v] : kNobody);
      other.position[v] = kNobody;
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

void stem_forward(Tensor x, Tensor norm, Tensor y, OptionalTensor stats) {
  const char* op = "stem_forward";
  check_dim({op, "x", x}, 4);
  const int64_t channels = x.size(3);
  const ScalarType accumulate = check_activation_dtype({op, "x", x});
  const int64_t x_stride = check_rows({op, "x", x});
  const int64_t norm_stride =
      check_table({op, "norm", norm}, kNormRows, channels, accumulate, x, "x");
  const int64_t out_height = ceil_div(x.size(1), 2), out_width = ceil_div(x.size(2), 2);
  const int64_t y_stride =
      check_activation({op, "y", y}, {x.size(0), out_height, out_width, channels}, x, "x");
  const int64_t stats_stride =
      stats ? check_table({op, "stats", *stats}, kStatsRows, channels, accumulate, x, "x") : 0;
  if (channels == 0) return;
  const Launcher launcher(op, x);
  const int64_t rows = x.size(0) * out_height * out_width;
  dispatch_activation({op, "x", x}, [&]<typename T>(T) {
    using A = Arithmetic<T>;
    if (rows == 0) {
      if (stats) clear_table(launcher, output_rows<A>(*stats, stats_stride), kStatsRows, channels);
      return;
    }
    const int width =
        vector_width(channels, sizeof(T), kVector<T>,
                     {{x.const_data_ptr(), x_stride}, {y.const_data_ptr(), y_stride}});
    const StemPlan plan(x, width, 0);
    const Tensor partials = torch::stable::new_empty(
        x, {stats ? partials_size(plan.parts(), channels) : 0}, accumulate);
    A* const data = stats ? static_cast<A*>(partials.mutable_data_ptr()) : nullptr;
    dispatch_width<kVector<T>>(width, [&]<int V>() {
      launcher.launch<&stem_forward_kernel<T, V>>({.grid_x = plan.parts(),
                                                   .grid_y = plan.columns.groups,
                                                   .block = kColumnThreads,
                                                   .shared_bytes = stats ? kMergeBytes<A, V> : 0},
                                                  input_rows<T>(x, x_stride),
                                                  input_rows<A>(norm, norm_stride),
                                                  output_rows<T>(y, y_stride), plan, data);
    });
    if (stats)
      finish_partials<MergeMoments, FinishStats>(launcher, data, plan.parts(), channels,
                                                 output_rows<A>(*stats, stats_stride));
  });
}

void stem_backward(Tensor dy, Tensor x, Tensor norm, int64_t count, Tensor dx, Tensor dnorm) {
  const char* op = "stem_backward";
  check_dim({op, "x", x}, 4);
  const int64_t channels = x.size(3);
  const ScalarType accumulate = check_activation_dtype({op, "x", x});
  const int64_t x_stride = check_rows({op, "x", x});
  const int64_t norm_stride =
      check_table({op, "norm", norm}, kNormRows, channels, accumulate, x, "x");
  const int64_t out_height = ceil_div(x.size(1), 2), out_width = ceil_div(x.size(2), 2);
  const int64_t dy_stride =
      check_activation({op, "dy", dy}, {x.size(0), out_height, out_width, channels}, x, "x");
  if (count < 0) fail({op, "count", x}, "must not be negative, got ", count);
  const int64_t dx_stride =
      check_activation({op, "dx", dx}, {x.size(0), x.size(1), x.size(2), channels}, x, "x");
  const int64_t dnorm_stride =
      check_table({op, "dnorm", dnorm}, kDnormRows, channels, accumulate, x, "x");
  if (channels == 0) return;
  const Launcher launcher(op, x);
  dispatch_activation({op, "x", x}, [&]<typename T>(T) {
    using A = Arithmetic<T>;
    const Rows<A> sums = output_rows<A>(dnorm, dnorm_stride);
    if (x.size(0) * out_height * out_width == 0)
      return clear_table(launcher, sums, kDnormRows, channels);
    const int width = vector_width(channels, sizeof(T), kVector<T>,
                                   {{x.const_data_ptr(), x_stride},
                                    {dy.const_data_ptr(), dy_stride},
                                    {dx.const_data_ptr(), dx_stride}});
    const StemPlan plan(x, width, 0), wide(x, width, 1);
    const Tensor partials =
        torch::stable::new_empty(x, {partials_size(plan.parts(), channels)}, accumulate);
    A* const data = static_cast<A*>(partials.mutable_data_ptr());
    dispatch_width<kVector<T>>(width, [&]<int V>() {
      launcher.launch<&stem_sums_kernel<T, V>>({.grid_x = plan.parts(),
                                                .grid_y = plan.columns.groups,
                                                .block = kColumnThreads,
                                                .shared_bytes = kMergeBytes<A, V>},
                                               input_rows<T>(dy, dy_stride),
                                               input_rows<T>(x, x_stride),
                                               input_rows<A>(norm, norm_stride), plan, data);
    });
    finish_partials<MergeSums, FinishDnorm>(launcher, data, plan.parts(), channels, sums);
    dispatch_width<kVector<T>>(width, [&]<int V>() {
      launcher.launch<&stem_gradient_kernel<T, V>>(
          {.grid_x = wide.parts(),
           .grid_y = wide.columns.groups,
           .block = kColumnThreads,
           .shared_bytes = 2 * kColumnThreads * V},
          input_rows<T>(dy, dy_stride), input_rows<T>(x, x_stride),
          input_rows<A>(norm, norm_stride), input_rows<A>(dnorm, dnorm_stride), count, wide,
          output_rows<T>(dx, dx_stride));
    });
  });
}

}  // namespace
}  // namespace densenet_efficient

DE_REGISTER(library) {
  library.impl("stem_forward", TORCH_BOX(&densenet_efficient::stem_forward));
  library.impl("stem_backward", TORCH_BOX(&densenet_efficient::stem_backward));
}
