// transition: y [N, H/2, W/2, K] = avg_pool2x2(relu(a * x + s)) @ weight^T and its gradients; with
// one or three dimensions, a window has 2 or 8 pixels instead of 4.
//
// Pooling in front of the product quarters its work. Forward: gemm/forward.h over pooled rows,
// each the mean of four normalised rows of x, rounded once; moves N * H * W * C + M * K elements.
// Backward: gemm/backward.h gives dpooled; each of the four pixels gets dz = dpooled / 4 where
// its own ReLU passed. The norm's correction needs the sums of dz, so the first pass takes sums and
// dweight, and the second makes dpooled again and writes dx: cheaper than keeping dz, and not
// rounded.
#include "gemm/backward.h"
#include "gemm/forward.h"
#include "rows/epilogue.h"
#include "rows/tables.h"

namespace densenet_efficient::cpu {
namespace {

constexpr int64_t kMostPixels = 8;  // of a window

// The rows of x [N, D, H, W, C] that each pooled row averages.
struct Pooling {
  Image x, y;
  int64_t pixels;                // of a window
  int64_t offsets[kMostPixels];  // of its pixels, from the first

  explicit Pooling(const Image& x) : x(x), y(x.halved()), pixels(x.window(2).size()), offsets{} {
    const Window window = x.window(2);
    for (int64_t i = 0; i < pixels; ++i) {
      const int64_t row = i / window.width % window.height, plane = i / 4;
      offsets[i] = (plane * x.H + row) * x.W + i % window.width;
    }
  }

  // Row of x at the first pixel of pooled row `row`.
  int64_t corner(int64_t row) const {
    const int64_t column = row % y.W, line = row / y.W % y.H, plane = row / (y.W * y.H);
    const Window step = x.window(2);
    const int64_t image = plane / y.D, deep = image * x.D + step.depth * (plane % y.D);
    return (deep * x.H + 2 * line) * x.W + step.width * column;
  }
};

// The sum of `count` values, 2, 4 or 8, by halves.
template <typename V>
inline V sum_by_halves(const V* values, int64_t count) {
  if (count == 2) return values[0] + values[1];
  return sum_by_halves(values, count / 2) + sum_by_halves(values + count / 2, count / 2);
}

// One pooled row as an operand, zero up to `padded` columns.
template <typename T>
inline void pooled_row(Rows<const T> x, int64_t corner, const Pooling& pool,
                       Rows<const Arithmetic<T>> norm, int64_t channels, int64_t padded,
                       Element<T>* out) {
  using V = Vector<Arithmetic<T>>;
  const Arithmetic<T> share = Arithmetic<T>(1) / static_cast<Arithmetic<T>>(pool.pixels);
  for_vectors<Arithmetic<T>>(padded, [&](int64_t c, int64_t count) {
    const int64_t left = channels - c;
    const V scale = load_vector(norm[kScale] + c, left);
    const V mean = load_vector(norm[kMean] + c, left);
    const V beta = load_vector(norm[kBeta] + c, left);
    V h[kMostPixels];
    for (int64_t i = 0; i < pool.pixels; ++i) {
      const V value = load_vector(x[corner + pool.offsets[i]] + c, left);
      h[i] = relu_vector(normalise(value, scale, mean, beta));
    }
    store_vector(sum_by_halves(h, pool.pixels) * share, out + c, count);
  });
}

template <typename T>
void forward(const arguments::TransitionForward& call) {
  using A = Arithmetic<T>;
  const int64_t C = call.C, padded = round_up(C, kGroup<T>);
  const Pooling pool(call);
  const auto x = input_rows<T>(call.x);
  const auto norm = input_rows<A>(call.norm);
  product_forward<T>(call.weight, pool.y.pixels(), output_rows<T>(call.y),
                     output_rows<A>(call.stats), [=](int64_t row, Element<T>* out) {
                       const int64_t corner = pool.corner(row);
                       for (int64_t i = 0; i < pool.pixels; ++i)
                         prefetch_row(x[corner + 8 + pool.offsets[i]], C);
                       pooled_row<T>(x, corner, pool, norm, C, padded, out);
                     });
}

template <typename T>
struct Backward {
  Pooling pool;
  int64_t channels;
  Rows<const T> dy, x;
  Rows<const Arithmetic<T>> norm;
  Rows<T> dx;
  Gradients<Arithmetic<T>> out;

  void run(const Tensor& weight, int64_t count) const {
    using A = Arithmetic<T>;
    const int64_t K = weight.size(0), padded = round_up(K, kGroup<T>);
    const int64_t M = pool.y.pixels();
    const auto load_dy = [&](int64_t row, Element<T>* to) {
      dy_row<T>(dy[row], nullptr, {}, K, padded, to);
    };
    product_backward<T>(weight, M, out, load_dy,
                        [&](const Part& part, const A* dh, A* sums, Unit<T>* h) {
                          take_sums(part, dh, sums, sums + tiling::kColumns, h);
                        });

    Workspace workspace(weight, tiling::transition_correction_bytes(channels, sizeof(A)));
    const Rows<A> own{workspace.take<A>(kCorrectionRows * channels), channels};
    make_correction<A>({out.dnorm.data, out.dnorm.stride}, norm, count, channels, own);
    const Rows<const A> correction{own.data, own.stride};
    const A* zeros = workspace.take_zeros<A>(channels);
    product_backward<T>(weight, M, {}, load_dy, [&](const Part& part, A* dh, A*, Unit<T>*) {
      for (int64_t i = 0; i < part.rows * part.width; ++i) dh[i] *= share();
      for (int64_t r = 0; r < part.rows; ++r)
        for (int64_t pixel = 0; pixel < pool.pixels; ++pixel) {
          const int64_t row = neighbour(part.first_row + r, pixel);
          prefetch_row(x[row + 2 * kAhead] + part.column, part.columns);
          write_dx(row, part.column, part.columns, dh + r * part.width, correction);
        }
    });
    // The edges that odd sizes leave out of the pooling.
    const Image& of = pool.x;
    const Window step = of.window(2);
    parallel(of.N * of.D * of.H, [&](int64_t line) {
      const bool dropped =
          line % of.H >= 2 * pool.y.H || line / of.H % of.D >= step.depth * pool.y.D;
      for (int64_t w = dropped ? 0 : step.width * pool.y.W; w < of.W; ++w)
        write_dx(line * of.W + w, 0, channels, zeros, correction);
    });
  }

 private:
  static constexpr int64_t kAhead = 4;  // pooled rows ahead that are asked for

  int64_t neighbour(int64_t row, int64_t pixel) const {
    return pool.corner(row) + pool.offsets[pixel];
  }
  Arithmetic<T> share() const { return Arithmetic<T>(1) / static_cast<Arithmetic<T>>(pool.pixels); }

  // Sums over the pixels of each row of dh, and the pooled rows as units.
  void take_sums(const Part& part, const Arithmetic<T>* dh, Arithmetic<T>* dgamma,
                 Arithmetic<T>* dbeta, Unit<T>* h) const {
    using A = Arithmetic<T>;
    using V = Vector<A>;
    for (int64_t r = 0; r < part.rows; r += kGroup<T>) {
      const int64_t unit_rows = std::min(kGroup<T>, part.rows - r);
      const T* pixels[kMostPixels * kGroup<T>];
      for (int64_t i = 0; i < pool.pixels * unit_rows; ++i) {
        const int64_t row = neighbour(part.first_row + r + i / pool.pixels, i % pool.pixels);
        pixels[i] = x[row] + part.column;
        prefetch_row(x[row + 2 * kAhead] + part.column, part.columns);
      }
      for_vectors<A>(part.width, [&](int64_t c, int64_t) {
        const int64_t at = part.column + c, left = part.columns - c;
        const V scale = load_vector(norm[kScale] + at, left);
        const V mean = load_vector(norm[kMean] + at, left);
        const V beta = load_vector(norm[kBeta] + at, left);
        V sum_dz_x = {}, sum_dz = {};
        V pooled[kGroup<T>] = {};
        for (int64_t i = 0; i < unit_rows; ++i) {
          const V part_of = load_whole(dh + (r + i) * part.width + c) * share();
          V relu[kMostPixels];
          for (int64_t pixel = 0; pixel < pool.pixels; ++pixel) {
            const V value = load_vector(pixels[pool.pixels * i + pixel] + c, left);
            const V z = normalise(value, scale, mean, beta);
            const V dz = relu_mask_vector(part_of, z);
            sum_dz_x += dz * (value - mean);
            sum_dz += dz;
            relu[pixel] = relu_vector(z);
          }
          pooled[i] = sum_by_halves(relu, pool.pixels) * share();
        }
        store_whole(load_whole(dgamma + c) + sum_dz_x, dgamma + c);
        store_whole(load_whole(dbeta + c) + sum_dz, dbeta + c);
        if (h) store_units<T>(pooled, h + r / kGroup<T> * part.width + c);
      });
    }
  }

  void write_dx(int64_t row, int64_t column, int64_t columns, const Arithmetic<T>* dh,
                Rows<const Arithmetic<T>> correction) const {
    const T* source = x[row] + column;
    T* to = dx[row] + column;
    for_vectors<Arithmetic<T>>(columns, [&](int64_t c, int64_t count) {
      store_vector(
          norm_backward<Arithmetic<T>>(load_vector(dh + c, count), load_vector(source + c, count),
                                       norm, correction, column + c, count),
          to + c, count);
    });
  }
};

void transition_forward(Tensor x, Tensor norm, Tensor weight, Tensor y, OptionalTensor stats) {
  const arguments::TransitionForward call(x, norm, weight, y, stats);
  dispatch_activation(x.scalar_type(), [&]<typename T>(T) { forward<T>(call); });
}

void transition_backward(Tensor dy, Tensor x, Tensor norm, Tensor weight, int64_t count, Tensor dx,
                         OptionalTensor dweight, Tensor dnorm) {
  const arguments::TransitionBackward call(dy, x, norm, weight, count, dx, dweight, dnorm);
  dispatch_activation(x.scalar_type(), [&]<typename T>(T) {
    using A = Arithmetic<T>;
    Backward<T>{Pooling(call),
                call.C,
                input_rows<T>(call.dy),
                input_rows<T>(call.x),
                input_rows<A>(call.norm),
                output_rows<T>(call.dx),
                gradients<A>(call)}
        .run(weight, call.count);
  });
}

}  // namespace
}  // namespace densenet_efficient::cpu

STABLE_TORCH_LIBRARY_IMPL(densenet_efficient, CPU, library) {
  library.impl("transition_forward", TORCH_BOX(&densenet_efficient::cpu::transition_forward));
  library.impl("transition_backward", TORCH_BOX(&densenet_efficient::cpu::transition_backward));
}
