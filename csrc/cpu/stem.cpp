// stem: y [N, ceil(D/2), ceil(H/2), ceil(W/2), C] = max_pool(relu(a * x + s), kernel 3, stride 2,
// padding 1) and its gradient; sizes of missing dimensions are 1. The normalised tensor is never
// written.
//
// Forward: an output row reads three rows of x, one of which its neighbour reads too (from the
// cache), in up to three planes. Backward, first pass: the maximum of each window, found again,
// gives the sums of dz and dz * (x - mean). Second pass: a task walks down input rows in pairs; for
// each row of windows it keeps which tap won (first maximum, row-major), and every input pixel
// gathers dy from the windows it may have won, up to two in every direction: dx is written once, in
// order. Values are compared in the arithmetic type, unrounded; where a window's maximum is not
// positive the ReLU is inactive, whichever pixel won.
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

  Rows<const T> x;  // [N, D, H, W, C]
  Rows<const A> norm;
  Image of;
  int64_t C;
  Image out = of.halved_up();  // windows

  // A row of windows: windows (t, v, 0 ...) of an image.
  struct Line {
    int64_t image, t, v;
  };
  Line line(int64_t index) const {
    return {index / (out.D * out.H), index / out.H % out.D, index % out.H};
  }
  int64_t first_window(const Line& l) const {
    return ((l.image * out.D + l.t) * out.H + l.v) * out.W;
  }

  // Pixel (d, i, j) as seen from window (t, v, u): 0 .. 26, row-major.
  static int tap(int64_t d, int64_t i, int64_t j, int64_t t, int64_t v, int64_t u) {
    return static_cast<int>(((d - 2 * t + 1) * 3 + i - 2 * v + 1) * 3 + j - 2 * u + 1);
  }

  // The pixels of a window that lie inside the image, in row-major order, and their taps.
  struct Pixels {
    const T* pixels[27];
    int taps[27];
    int count;
  };

  Pixels window(const Line& l, int64_t u) const {
    const auto first = [](int64_t at) { return std::max<int64_t>(0, 2 * at - 1); };
    const auto last = [](int64_t at, int64_t size) { return std::min(size, 2 * at + 2); };
    Pixels w;
    w.count = 0;
    for (int64_t d = first(l.t); d < last(l.t, of.D); ++d)
      for (int64_t i = first(l.v); i < last(l.v, of.H); ++i)
        for (int64_t j = first(u); j < last(u, of.W); ++j) {
          w.pixels[w.count] = x[((l.image * of.D + d) * of.H + i) * of.W + j];
          w.taps[w.count++] = tap(d, i, j, l.t, l.v, u);
        }
    return w;
  }

  // Visits a window by vectors of channels: the largest a * x + s (a NaN wins, as it does in
  // PyTorch), the x it came from and its tap, the first of several.
  template <typename Visit>
  void winners(const Pixels& w, const Visit& visit) const {
    for_vectors<A>(C, [&](int64_t c, int64_t count) {
      const V scale = load_vector(norm[kScale] + c, count);
      const V mean = load_vector(norm[kMean] + c, count);
      const V beta = load_vector(norm[kBeta] + c, count);
      V best = V{} - std::numeric_limits<A>::infinity(), chosen = {}, tap = {};
      for (int i = 0; i < w.count; ++i) {
        const V value = load_vector(w.pixels[i] + c, count);
        const V z = normalise(value, scale, mean, beta);
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
  const int64_t C = stem.C, width = stem.out.W, slots = threads();
  const tiling::Stem plan(stem.of, C, sizeof(A), slots);
  Workspace workspace(like, plan.bytes);
  GroupMoments moments(workspace, plan.groups.groups, C);
  A* spares = workspace.take<A>(slots * moments.kSpare * C);
  parallel(plan.groups.groups, [&](int64_t group) {
    A* spare = spares + own_slot(slots) * moments.kSpare * C;
    for (int64_t line = plan.groups.first(group); line < plan.groups.first(group + 1); ++line) {
      for (int64_t u = 0; u < width; ++u)
        stem.winners(stem.window(stem.line(line), u),
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
    const tiling::Stem plan(stem.of, C, sizeof(A), slots);
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
    const int64_t C = stem.C, width = stem.out.W, slots = threads();
    parallel(plan.groups.groups, [&](int64_t group) {
      A* dgamma = line_sums + own_slot(slots) * 2 * plan.width;
      A* dbeta = dgamma + plan.width;
      for (int64_t line = plan.groups.first(group); line < plan.groups.first(group + 1); ++line) {
        std::fill_n(dgamma, 2 * plan.width, A(0));
        for (int64_t u = 0; u < width; ++u)
          stem.winners(
              stem.window(stem.line(line), u), [&](int64_t c, int64_t count, V best, V chosen, V) {
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

  // Which taps won, for the row of windows (t, v) and its later neighbours: [t' - t][v' - v].
  struct Winners {
    A* lines[2][2];
  };

  void write_dx(const tiling::Stem& plan, A* winners, Rows<const A> correction) const {
    const Image& of = stem.of;
    const int64_t slots = threads(), pitch = stem.out.W * plan.width;
    const int64_t deep = of.D > 1 ? 2 : 1;  // lines of windows in depth that a pixel may lie in
    parallel(plan.groups.groups, [&](int64_t group) {
      A* own = winners + own_slot(slots) * plan.winners;
      Winners won{};
      for (int64_t t = 0; t < deep; ++t)
        for (int64_t v = 0; v < 2; ++v) won.lines[t][v] = own + (2 * t + v) * pitch;
      int64_t known = -1;  // the line of windows whose winners are known
      for (int64_t index = plan.groups.first(group); index < plan.groups.first(group + 1);
           ++index) {
        const auto l = stem.line(index);
        for (int64_t t = 0; t < deep && l.t + t < stem.out.D; ++t) {
          auto& [upper, lower] = won.lines[t];
          std::swap(upper, lower);
          if (known != index) find_winners({l.image, l.t + t, l.v}, plan.width, upper);
          if (l.v + 1 < stem.out.H) find_winners({l.image, l.t + t, l.v + 1}, plan.width, lower);
        }
        known = l.v + 1 < stem.out.H ? index + 1 : -1;
        for (int64_t d = 2 * l.t; d < std::min(of.D, 2 * l.t + 2); ++d)
          for (int64_t i = 2 * l.v; i < std::min(of.H, 2 * l.v + 2); ++i)
            for (int64_t j = 0; j < of.W; ++j) write_pixel(l, d, i, j, plan.width, won, correction);
      }
    });
  }

  // The winning taps of a line of windows, `pitch` channels each.
  void find_winners(const typename Stem<T>::Line& line, int64_t pitch, A* won) const {
    for (int64_t u = 0; u < stem.out.W; ++u)
      stem.winners(stem.window(line, u),
                   [&](int64_t c, int64_t, V, V, V tap) { store_whole(tap, won + u * pitch + c); });
  }

  // Input pixel (d, i, j) lies in the windows t = d / 2 and, for odd d, t + 1; so in every
  // direction.
  void write_pixel(const typename Stem<T>::Line& l, int64_t d, int64_t i, int64_t j, int64_t pitch,
                   const Winners& known, Rows<const A> correction) const {
    const Image &of = stem.of, &out = stem.out;
    const A* won[8];
    const T* dy_of[8];
    A tap[8];
    int windows = 0;
    for (int64_t t = d / 2; t <= std::min((d + 1) / 2, out.D - 1); ++t)
      for (int64_t v = i / 2; v <= std::min((i + 1) / 2, out.H - 1); ++v)
        for (int64_t u = j / 2; u <= std::min((j + 1) / 2, out.W - 1); ++u) {
          won[windows] = known.lines[t - l.t][v - l.v] + u * pitch;
          dy_of[windows] = dy[stem.first_window({l.image, t, v}) + u];
          tap[windows++] = A(stem.tap(d, i, j, t, v, u));
        }
    const int64_t pixel = ((l.image * of.D + d) * of.H + i) * of.W + j;
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
  return {input_rows<T>(call.x), input_rows<Arithmetic<T>>(call.norm), call, call.C};
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
