// stem: y [N, ceil(H/2), ceil(W/2), C] = max_pool(relu(a * x + s), kernel 3, stride 2, padding 1) and
// its gradient. The normalised tensor is never written.
//
// Forward: an output row reads three rows of x, one of which its neighbour reads too (from the cache).
// Backward, first pass: the maximum of each window, found again, gives the sums of dz and
// dz * (x - mean). Second pass: a task walks down input rows in pairs; for each row of windows it keeps
// which tap won (first maximum, row-major), and every input pixel gathers dy from the up to four
// windows it may have won: dx is written once, in order. Values are compared in the arithmetic type,
// unrounded; where a window's maximum is not positive the ReLU cuts, whichever pixel won.
#include <limits>

#include "moments.h"

namespace densenet_efficient::cpu {
namespace {

// Per-channel vectors of a task: the best value, what was chosen, sums or moments.
constexpr int64_t kSpareRows = 4;

template <typename T>
struct Stem {
  using A = Arithmetic<T>;
  using Index = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;

  Rows<const T> x;  // [N, H, W, C]
  Rows<const A> norm;
  int64_t N, H, W, C;

  int64_t out_height() const { return (H + 1) / 2; }
  int64_t out_width() const { return (W + 1) / 2; }

  // Calls visit(tap, row of x) for the taps of window (v, u) that lie inside the image.
  template <typename Visit>
  void taps(int64_t image, int64_t v, int64_t u, const Visit& visit) const {
    for (int64_t i = std::max<int64_t>(0, 2 * v - 1); i < std::min(H, 2 * v + 2); ++i)
      for (int64_t j = std::max<int64_t>(0, 2 * u - 1); j < std::min(W, 2 * u + 2); ++j)
        visit((i - 2 * v + 1) * 3 + j - 2 * u + 1, x[(image * H + i) * W + j]);
  }

  // best[c]: the largest a * x + s of the window; a NaN wins, as it does in the framework.
  void maximum(int64_t image, int64_t v, int64_t u, A* __restrict best) const {
    const A* __restrict scale = norm[kScale];
    const A* __restrict shift = norm[kShift];
    std::fill_n(best, C, -std::numeric_limits<A>::infinity());
    taps(image, v, u, [&](int64_t, const T* __restrict row) {
      for (int64_t c = 0; c < C; ++c) {
        const A z = normalise(load(row[c]), scale[c], shift[c]);
        best[c] = z <= best[c] ? best[c] : z;
      }
    });
  }

  // The same, and `chosen`: mark(tap, x) of the pixel that won.
  template <typename Chosen, typename Mark>
  void winner(int64_t image, int64_t v, int64_t u, A* __restrict best, Chosen* __restrict chosen,
              const Mark& mark) const {
    const A* __restrict scale = norm[kScale];
    const A* __restrict shift = norm[kShift];
    std::fill_n(best, C, -std::numeric_limits<A>::infinity());
    std::fill_n(chosen, C, Chosen(0));
    taps(image, v, u, [&](int64_t tap, const T* __restrict row) {
      for (int64_t c = 0; c < C; ++c) {
        const A value = load(row[c]);
        const A z = normalise(value, scale[c], shift[c]);
        const bool loses = z <= best[c];
        best[c] = loses ? best[c] : z;
        chosen[c] = loses ? chosen[c] : static_cast<Chosen>(mark(tap, value));
      }
    });
  }
};

template <typename T>
void forward(const Stem<T>& stem, const Tensor& like, Rows<T> y,
             std::optional<Rows<Arithmetic<T>>> stats) {
  using A = Arithmetic<T>;
  const int64_t C = stem.C, height = stem.out_height(), width = stem.out_width();
  const int64_t slots = threads();
  const workspace::cpu::Stem plan(stem.N, stem.H, stem.W, C, sizeof(A), slots);
  Workspace workspace(like, plan.bytes);
  GroupMoments moments(workspace, plan.groups.groups, C);
  A* spares = workspace.take<A>(slots * kSpareRows * C);
  parallel(plan.groups.groups, [&](int64_t group) {
    A* best = spares + own_slot(slots) * kSpareRows * C;
    for (int64_t line = plan.groups.first(group); line < plan.groups.first(group + 1); ++line) {
      for (int64_t u = 0; u < width; ++u) {
        stem.maximum(line / height, line % height, u, best);
        for (int64_t c = 0; c < C; ++c) best[c] = relu(best[c]);
        store_row<T>(best, C, y[line * width + u]);
      }
      if (stats) moments.add<T>(group, {y[line * width], y.stride}, width, best + C);
    }
  });
  if (stats) moments.finish(*stats);
}

// Adds what a window's winner contributes to the sums.
template <typename T>
inline void add_dz(const T* __restrict dy, const Arithmetic<T>* __restrict best,
                   const Arithmetic<T>* __restrict chosen, const Arithmetic<T>* __restrict mean,
                   int64_t channels, Arithmetic<T>* __restrict dgamma,
                   Arithmetic<T>* __restrict dbeta) {
  using A = Arithmetic<T>;
  for (int64_t c = 0; c < channels; ++c) {
    const A dz = relu_mask(load(dy[c]), best[c]);
    dgamma[c] += dz * (chosen[c] - mean[c]);
    dbeta[c] += dz;
  }
}

// dh of a pixel gains dy of a window that it won as tap `tap`.
template <typename T, typename Index>
inline void gather(const T* __restrict dy, const Index* __restrict won, Index tap,
                   int64_t channels, Arithmetic<T>* __restrict dh) {
  for (int64_t c = 0; c < channels; ++c)
    dh[c] += won[c] == tap ? load(dy[c]) : Arithmetic<T>(0);
}

template <typename T>
struct Backward {
  using A = Arithmetic<T>;
  using Index = typename Stem<T>::Index;

  Stem<T> stem;
  Rows<const T> dy;
  Rows<T> dx;
  Rows<A> dnorm;

  void run(const Tensor& like, int64_t count) const {
    const int64_t C = stem.C, slots = threads();
    const workspace::cpu::Stem plan(stem.N, stem.H, stem.W, C, sizeof(A), slots);
    Workspace workspace(like, plan.bytes);
    double* sums = workspace.take_zeros<double>(plan.groups.groups * 2 * C);
    A* spares = workspace.take<A>(slots * kSpareRows * C);
    Index* winners = workspace.take<Index>(slots * plan.winners);
    A* correction_data = workspace.take<A>(kCorrectionRows * C);
    take_sums(plan, spares, sums);
    finish_dnorm<A>(sums, plan.groups.groups, C, stem.norm[kRstd], dnorm);
    const Rows<A> correction{correction_data, C};
    make_correction<A>({dnorm.data, dnorm.stride}, stem.norm, count, C, correction);
    write_dx(plan, spares, winners, {correction_data, C});
  }

 private:
  void take_sums(const workspace::cpu::Stem& plan, A* spares, double* sums) const {
    const int64_t C = stem.C, height = stem.out_height(), width = stem.out_width();
    const int64_t slots = threads();
    parallel(plan.groups.groups, [&](int64_t group) {
      A* best = spares + own_slot(slots) * kSpareRows * C;
      A* chosen = best + C;
      A* line_sums = best + 2 * C;
      for (int64_t line = plan.groups.first(group); line < plan.groups.first(group + 1); ++line) {
        std::fill_n(line_sums, 2 * C, A(0));
        for (int64_t u = 0; u < width; ++u) {
          stem.winner(line / height, line % height, u, best, chosen,
                      [](int64_t, A value) { return value; });
          add_dz<T>(dy[line * width + u], best, chosen, stem.norm[kMean], C, line_sums,
                    line_sums + C);
        }
        add_to(line_sums, 2 * C, sums + 2 * group * C);
      }
    });
  }

  void write_dx(const workspace::cpu::Stem& plan, A* spares, Index* winners,
                Rows<const A> correction) const {
    const int64_t C = stem.C, height = stem.out_height(), width = stem.out_width();
    const int64_t slots = threads();
    parallel(plan.groups.groups, [&](int64_t group) {
      const int64_t slot = own_slot(slots);
      A* dh = spares + slot * kSpareRows * C;
      Index* upper = winners + slot * plan.winners;
      Index* lower = upper + width * C;
      int64_t known = -1;  // the line of windows that `lower` describes
      for (int64_t line = plan.groups.first(group); line < plan.groups.first(group + 1); ++line) {
        const int64_t image = line / height, v = line % height;
        std::swap(upper, lower);
        if (known != line) find_winners(image, v, dh, upper);
        if (v + 1 < height) find_winners(image, v + 1, dh, lower);
        known = v + 1 < height ? line + 1 : -1;
        for (int64_t i = 2 * v; i < std::min(stem.H, 2 * v + 2); ++i)
          for (int64_t j = 0; j < stem.W; ++j)
            write_pixel(image, i, j, upper, lower, correction, dh);
      }
    });
  }

  void find_winners(int64_t image, int64_t v, A* best, Index* won) const {
    for (int64_t u = 0; u < stem.out_width(); ++u)
      stem.winner(image, v, u, best, won + u * stem.C, [](int64_t tap, A) { return tap; });
  }

  // Input pixel (i, j) lies in the windows v = i / 2 and, for odd i, v + 1; the same for j.
  void write_pixel(int64_t image, int64_t i, int64_t j, const Index* upper, const Index* lower,
                   Rows<const A> correction, A* __restrict dh) const {
    const int64_t C = stem.C, height = stem.out_height(), width = stem.out_width();
    std::fill_n(dh, C, A(0));
    for (int64_t v = i / 2; v <= std::min((i + 1) / 2, height - 1); ++v)
      for (int64_t u = j / 2; u <= std::min((j + 1) / 2, width - 1); ++u)
        gather<T, Index>(dy[(image * height + v) * width + u],
                         (v == i / 2 ? upper : lower) + u * C,
                         static_cast<Index>((i - 2 * v + 1) * 3 + j - 2 * u + 1), C, dh);
    const int64_t pixel = (image * stem.H + i) * stem.W + j;
    norm_backward_row<T>(dh, stem.x[pixel], stem.norm, correction, 0, C, dx[pixel]);
  }
};

void stem_forward(Tensor x, Tensor norm, Tensor y, OptionalTensor stats) {
  const char* op = "stem_forward";
  check_dim({op, "x", x}, 4);
  const int64_t N = x.size(0), H = x.size(1), W = x.size(2), C = x.size(3);
  const ScalarType accumulate = check_activation_dtype({op, "x", x});
  const int64_t x_stride = check_rows({op, "x", x});
  const int64_t norm_stride = check_table({op, "norm", norm}, kNormRows, C, accumulate, x, "x");
  const int64_t y_stride =
      check_activation({op, "y", y}, {N, (H + 1) / 2, (W + 1) / 2, C}, x, "x");
  const int64_t stats_stride =
      stats ? check_table({op, "stats", *stats}, kStatsRows, C, accumulate, x, "x") : 0;
  DE_DISPATCH(x.scalar_type(), T, {
    using A = Arithmetic<T>;
    std::optional<Rows<A>> stats_rows;
    if (stats) stats_rows = output_rows<A>(*stats, stats_stride);
    forward<T>({input_rows<T>(x, x_stride), input_rows<A>(norm, norm_stride), N, H, W, C}, x,
               output_rows<T>(y, y_stride), stats_rows);
  });
}

void stem_backward(Tensor dy, Tensor x, Tensor norm, int64_t count, Tensor dx, Tensor dnorm) {
  const char* op = "stem_backward";
  check_dim({op, "x", x}, 4);
  const int64_t N = x.size(0), H = x.size(1), W = x.size(2), C = x.size(3);
  const ScalarType accumulate = check_activation_dtype({op, "x", x});
  const int64_t x_stride = check_rows({op, "x", x});
  const int64_t dy_stride =
      check_activation({op, "dy", dy}, {N, (H + 1) / 2, (W + 1) / 2, C}, x, "x");
  const int64_t norm_stride = check_table({op, "norm", norm}, kNormRows, C, accumulate, x, "x");
  if (count < 0) fail({op, "count", x}, "must not be negative, got ", count);
  const int64_t dx_stride = check_activation({op, "dx", dx}, {N, H, W, C}, x, "x");
  const int64_t dnorm_stride = check_table({op, "dnorm", dnorm}, kDnormRows, C, accumulate, x, "x");
  DE_DISPATCH(x.scalar_type(), T, {
    using A = Arithmetic<T>;
    Backward<T>{{input_rows<T>(x, x_stride), input_rows<A>(norm, norm_stride), N, H, W, C},
                input_rows<T>(dy, dy_stride),
                output_rows<T>(dx, dx_stride),
                output_rows<A>(dnorm, dnorm_stride)}
        .run(x, count);
  });
}

}  // namespace
}  // namespace densenet_efficient::cpu

STABLE_TORCH_LIBRARY_IMPL(densenet_efficient, CPU, library) {
  library.impl("stem_forward", TORCH_BOX(&densenet_efficient::cpu::stem_forward));
  library.impl("stem_backward", TORCH_BOX(&densenet_efficient::cpu::stem_backward));
}
