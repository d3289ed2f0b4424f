// stem: y [N, ceil(H/2), ceil(W/2), C] = max_pool(relu(a * x + s), kernel 3, stride 2, padding 1)
// and its gradient. The normalised tensor is never written.
//
// Forward: an output row reads three rows of x, one of which its neighbour reads too (from the
// cache). Backward, first pass: the maximum of each window, found again, gives the sums of dz and
// dz * (x - mean). Second pass: a task walks down input rows in pairs; for each row of windows it
// keeps which tap won (first maximum, row-major), and every input pixel gathers dy from the up to
// four windows it may have won: dx is written once, in order. Values are compared in the arithmetic
// type, unrounded; where a window's maximum is not positive the ReLU is inactive, whichever pixel
// won.
#include <limits>

#include "rows/epilogue.h"
#include "rows/moments.h"
#include "rows/tables.h"

namespace densenet_efficient::cpu {
namespace {

template <typename T>
struct Stem {
  using A = Arithmetic<T>;
  using V = Vector<A>;

  Rows<const T> x;  // [N, H, W, C]
  Rows<const A> norm;
  int64_t N, H, W, C;

  int64_t out_height() const { return (H + 1) / 2; }
  int64_t out_width() const { return (W + 1) / 2; }

  // The pixels of a window that lie inside the image, in row-major order, and their taps (0 .. 8).
  struct Window {
    const T* pixels[9];
    int taps[9];
    int count;
  };

  Window window(int64_t image, int64_t v, int64_t u) const {
    Window w;
    w.count = 0;
    for (int64_t i = std::max<int64_t>(0, 2 * v - 1); i < std::min(H, 2 * v + 2); ++i)
      for (int64_t j = std::max<int64_t>(0, 2 * u - 1); j < std::min(W, 2 * u + 2); ++j) {
        w.pixels[w.count] = x[(image * H + i) * W + j];
        w.taps[w.count++] = static_cast<int>((i - 2 * v + 1) * 3 + j - 2 * u + 1);
      }
    return w;
  }

  // Visits a window by vectors of channels: the largest a * x + s (a NaN wins, as it does in
  // PyTorch), the x it came from and its tap, the first of several.
  template <typename Visit>
  void winners(const Window& w, const Visit& visit) const {
    for_vectors<A>(C, [&](int64_t c, int64_t count) {
      const V scale = load_vector(norm[kScale] + c, count);
      const V shift = load_vector(norm[kShift] + c, count);
      V best = V{} - std::numeric_limits<A>::infinity(), chosen = {}, tap = {};
      for (int i = 0; i < w.count; ++i) {
        const V value = load_vector(w.pixels[i] + c, count);
        const V z = normalise(value, scale, shift);
        const auto loses = z <= best;
        best = loses ? best : z;
        chosen = loses ? chosen : value;
        tap = loses ? tap : V{} + A(w.taps[i]);
      }
      visit(c, count, best, chosen, tap);
    });
  }
};

template <typename T>
void forward(const Stem<T>& stem, const Tensor& like, Rows<T> y, Rows<Arithmetic<T>> stats) {
  using A = Arithmetic<T>;
  const int64_t C = stem.C, height = stem.out_height(), width = stem.out_width();
  const int64_t slots = threads();
  const tiling::Stem plan(stem.N, stem.H, stem.W, C, sizeof(A), slots);
  Workspace workspace(like, plan.bytes);
  GroupMoments moments(workspace, plan.groups.groups, C);
  A* spares = workspace.take<A>(slots * moments.kSpare * C);
  parallel(plan.groups.groups, [&](int64_t group) {
    A* spare = spares + own_slot(slots) * moments.kSpare * C;
    for (int64_t line = plan.groups.first(group); line < plan.groups.first(group + 1); ++line) {
      for (int64_t u = 0; u < width; ++u)
        stem.winners(stem.window(line / height, line % height, u),
                     [&](int64_t c, int64_t count, auto best, auto, auto) {
                       store_vector(relu_vector(best), y[line * width + u] + c, count);
                     });
      if (stats.data) moments.add<T>(group, {y[line * width], y.stride}, width, spare);
    }
  });
  if (stats.data) moments.finish(stats);
}

template <typename T>
struct Backward {
  using A = Arithmetic<T>;
  using V = Vector<A>;

  Stem<T> stem;
  Rows<const T> dy;
  Rows<T> dx;
  Rows<A> dnorm;

  void run(const Tensor& like, int64_t count) const {
    const int64_t C = stem.C, slots = threads();
    const tiling::Stem plan(stem.N, stem.H, stem.W, C, sizeof(A), slots);
    Workspace workspace(like, plan.bytes);
    double* sums = workspace.take_zeros<double>(plan.groups.groups * 2 * C);
    A* line_sums = workspace.take<A>(slots * 2 * plan.width);
    A* winners = workspace.take<A>(slots * plan.winners);
    const Rows<A> correction{workspace.take<A>(kCorrectionRows * C), C};
    take_sums(plan, line_sums, sums);
    finish_dnorm<A>(sums, plan.groups.groups, C, stem.norm[kRstd], dnorm);
    make_correction<A>({dnorm.data, dnorm.stride}, stem.norm, count, C, correction);
    write_dx(plan, winners, {correction.data, C});
  }

 private:
  // Sums of dz and dz * (x - mean) over the windows.
  void take_sums(const tiling::Stem& plan, A* line_sums, double* sums) const {
    const int64_t C = stem.C, height = stem.out_height(), width = stem.out_width();
    const int64_t slots = threads();
    parallel(plan.groups.groups, [&](int64_t group) {
      A* dgamma = line_sums + own_slot(slots) * 2 * plan.width;
      A* dbeta = dgamma + plan.width;
      for (int64_t line = plan.groups.first(group); line < plan.groups.first(group + 1); ++line) {
        std::fill_n(dgamma, 2 * plan.width, A(0));
        for (int64_t u = 0; u < width; ++u)
          stem.winners(stem.window(line / height, line % height, u), [&](int64_t c, int64_t count,
                                                                         V best, V chosen, V) {
            const V dz = relu_mask_vector(load_vector(dy[line * width + u] + c, count), best);
            const V mean = load_vector(stem.norm[kMean] + c, count);
            store_whole(load_whole(dgamma + c) + dz * (chosen - mean), dgamma + c);
            store_whole(load_whole(dbeta + c) + dz, dbeta + c);
          });
        add_to(dgamma, C, sums + 2 * group * C);
        add_to(dbeta, C, sums + (2 * group + 1) * C);
      }
    });
  }

  void write_dx(const tiling::Stem& plan, A* winners, Rows<const A> correction) const {
    const int64_t height = stem.out_height(), slots = threads();
    parallel(plan.groups.groups, [&](int64_t group) {
      A* upper = winners + own_slot(slots) * plan.winners;
      A* lower = upper + plan.winners / 2;
      int64_t known = -1;  // the line of windows that `lower` describes
      for (int64_t line = plan.groups.first(group); line < plan.groups.first(group + 1); ++line) {
        const int64_t image = line / height, v = line % height;
        std::swap(upper, lower);
        if (known != line) find_winners(image, v, plan.width, upper);
        if (v + 1 < height) find_winners(image, v + 1, plan.width, lower);
        known = v + 1 < height ? line + 1 : -1;
        for (int64_t i = 2 * v; i < std::min(stem.H, 2 * v + 2); ++i)
          for (int64_t j = 0; j < stem.W; ++j)
            write_pixel(image, i, j, plan.width, upper, lower, correction);
      }
    });
  }

  // The winning taps of a line of windows, `pitch` channels each.
  void find_winners(int64_t image, int64_t v, int64_t pitch, A* won) const {
    for (int64_t u = 0; u < stem.out_width(); ++u)
      stem.winners(stem.window(image, v, u),
                   [&](int64_t c, int64_t, V, V, V tap) { store_whole(tap, won + u * pitch + c); });
  }

  // Input pixel (i, j) lies in the windows v = i / 2 and, for odd i, v + 1; the same for j.
  void write_pixel(int64_t image, int64_t i, int64_t j, int64_t pitch, const A* upper,
                   const A* lower, Rows<const A> correction) const {
    const int64_t height = stem.out_height(), width = stem.out_width();
    const A* won[4];
    const T* dy_of[4];
    A tap[4];
    int windows = 0;
    for (int64_t v = i / 2; v <= std::min((i + 1) / 2, height - 1); ++v)
      for (int64_t u = j / 2; u <= std::min((j + 1) / 2, width - 1); ++u) {
        won[windows] = (v == i / 2 ? upper : lower) + u * pitch;
        dy_of[windows] = dy[(image * height + v) * width + u];
        tap[windows++] = A((i - 2 * v + 1) * 3 + j - 2 * u + 1);
      }
    const int64_t pixel = (image * stem.H + i) * stem.W + j;
    const T* x = stem.x[pixel];
    for_vectors<A>(stem.C, [&](int64_t c, int64_t count) {
      V dh = {};
      for (int w = 0; w < windows; ++w)
        dh += load_whole(won[w] + c) == V{} + tap[w] ? load_vector(dy_of[w] + c, count) : V{};
      store_vector(norm_backward<A>(dh, load_vector(x + c, count), stem.norm, correction, c, count),
                   dx[pixel] + c, count);
    });
  }
};

template <typename T, typename Call>
Stem<T> stem(const Call& call) {
  return {
      input_rows<T>(call.x), input_rows<Arithmetic<T>>(call.norm), call.N, call.H, call.W, call.C};
}

void stem_forward(Tensor x, Tensor norm, Tensor y, OptionalTensor stats) {
  const arguments::StemForward call(x, norm, y, stats);
  dispatch_activation(x.scalar_type(), [&]<typename T>(T) {
    forward<T>(stem<T>(call), x, output_rows<T>(call.y), output_rows<Arithmetic<T>>(call.stats));
  });
}

void stem_backward(Tensor dy, Tensor x, Tensor norm, int64_t count, Tensor dx, Tensor dnorm) {
  const arguments::StemBackward call(dy, x, norm, count, dx, dnorm);
  dispatch_activation(x.scalar_type(), [&]<typename T>(T) {
    Backward<T>{stem<T>(call), input_rows<T>(call.dy), output_rows<T>(call.dx),
                output_rows<Arithmetic<T>>(call.dnorm)}
        .run(x, call.count);
  });
}

}  // namespace
}  // namespace densenet_efficient::cpu

STABLE_TORCH_LIBRARY_IMPL(densenet_efficient, CPU, library) {
  library.impl("stem_forward", TORCH_BOX(&densenet_efficient::cpu::stem_forward));
  library.impl("stem_backward", TORCH_BOX(&densenet_efficient::cpu::stem_backward));
}
