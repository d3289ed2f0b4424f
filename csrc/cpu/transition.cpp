// transition: y [N, H/2, W/2, K] = avg_pool2x2(relu(a * x + s)) @ weight^T and its gradients.
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

// The rows of x [N, H, W, C] that each pooled row averages.
struct Pooling {
  int64_t height, width;  // of y
  int64_t x_height, x_width;

  // Row of x at the upper left of pooled row `row`.
  int64_t corner(int64_t row) const {
    const int64_t image = row / (height * width), pixel = row % (height * width);
    return (image * x_height + 2 * (pixel / width)) * x_width + 2 * (pixel % width);
  }
};

// One pooled row as an operand, zero up to `padded` columns.
template <typename T>
inline void pooled_row(Rows<const T> x, int64_t corner, int64_t x_width,
                       Rows<const Arithmetic<T>> norm, int64_t channels, int64_t padded,
                       Element<T>* out) {
  for_vectors<Arithmetic<T>>(padded, [&](int64_t c, int64_t count) {
    const int64_t left = channels - c;
    const auto scale = load_vector(norm[kScale] + c, left);
    const auto shift = load_vector(norm[kShift] + c, left);
    const auto h = [&](int64_t row) {
      return relu_vector(normalise(load_vector(x[row] + c, left), scale, shift));
    };
    const auto sum = (h(corner) + h(corner + 1)) + (h(corner + x_width) + h(corner + x_width + 1));
    store_vector(sum * Arithmetic<T>(0.25), out + c, count);
  });
}

template <typename Call>
Pooling pooling(const Call& call) {
  return {call.H / 2, call.W / 2, call.H, call.W};
}

template <typename T>
void forward(const arguments::TransitionForward& call) {
  using A = Arithmetic<T>;
  const int64_t C = call.C, padded = round_up(C, kGroup<T>);
  const Pooling pool = pooling(call);
  const auto x = input_rows<T>(call.x);
  const auto norm = input_rows<A>(call.norm);
  product_forward<T>(call.weight, call.N * pool.height * pool.width, output_rows<T>(call.y),
                     output_rows<A>(call.stats), [=](int64_t row, Element<T>* out) {
                       const int64_t ahead = pool.corner(row) + 8;
                       for (const int64_t next : {ahead, ahead + 1})
                         for (const int64_t below : {int64_t(0), pool.x_width})
                           prefetch_row(x[next + below], C);
                       pooled_row<T>(x, pool.corner(row), pool.x_width, norm, C, padded, out);
                     });
}

template <typename T>
struct Backward {
  Pooling pool;
  int64_t images, channels;
  Rows<const T> dy, x;
  Rows<const Arithmetic<T>> norm;
  Rows<T> dx;
  Gradients<Arithmetic<T>> out;

  void run(const Tensor& weight, int64_t count) const {
    using A = Arithmetic<T>;
    const int64_t K = weight.size(0), padded = round_up(K, kGroup<T>);
    const int64_t M = images * pool.height * pool.width;
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
      for (int64_t i = 0; i < part.rows * part.width; ++i) dh[i] *= A(0.25);
      for (int64_t r = 0; r < part.rows; ++r)
        for (int64_t pixel = 0; pixel < 4; ++pixel) {
          const int64_t row = neighbour(part.first_row + r, pixel);
          prefetch_row(x[row + 2 * kAhead] + part.column, part.columns);
          write_dx(row, part.column, part.columns, dh + r * part.width, correction);
        }
    });
    // The edge that an odd height or width leaves out of the pooling.
    parallel(images * pool.x_height, [&](int64_t line) {
      const bool dropped = line % pool.x_height >= 2 * pool.height;
      for (int64_t w = dropped ? 0 : 2 * pool.width; w < pool.x_width; ++w)
        write_dx(line * pool.x_width + w, 0, channels, zeros, correction);
    });
  }

 private:
  static constexpr int64_t kAhead = 4;  // pooled rows ahead that are asked for

  int64_t neighbour(int64_t row, int64_t pixel) const {
    return pool.corner(row) + pixel / 2 * pool.x_width + pixel % 2;
  }

  // Sums over the four pixels of each row of dh, and the pooled rows as units.
  void take_sums(const Part& part, const Arithmetic<T>* dh, Arithmetic<T>* dgamma,
                 Arithmetic<T>* dbeta, Unit<T>* h) const {
    using A = Arithmetic<T>;
    using V = Vector<A>;
    for (int64_t r = 0; r < part.rows; r += kGroup<T>) {
      const int64_t unit_rows = std::min(kGroup<T>, part.rows - r);
      const T* pixels[4 * kGroup<T>];
      for (int64_t i = 0; i < 4 * unit_rows; ++i) {
        const int64_t row = neighbour(part.first_row + r + i / 4, i % 4);
        pixels[i] = x[row] + part.column;
        prefetch_row(x[row + 2 * kAhead] + part.column, part.columns);
      }
      for_vectors<A>(part.width, [&](int64_t c, int64_t) {
        const int64_t at = part.column + c, left = part.columns - c;
        const V scale = load_vector(norm[kScale] + at, left);
        const V shift = load_vector(norm[kShift] + at, left);
        const V mean = load_vector(norm[kMean] + at, left);
        V sum_dz_x = {}, sum_dz = {};
        V pooled[kGroup<T>] = {};
        for (int64_t i = 0; i < unit_rows; ++i) {
          const V quarter = load_whole(dh + (r + i) * part.width + c) * A(0.25);
          V relu[4];
          for (int64_t pixel = 0; pixel < 4; ++pixel) {
            const V value = load_vector(pixels[4 * i + pixel] + c, left);
            const V z = normalise(value, scale, shift);
            const V dz = relu_mask_vector(quarter, z);
            sum_dz_x += dz * (value - mean);
            sum_dz += dz;
            relu[pixel] = relu_vector(z);
          }
          pooled[i] = ((relu[0] + relu[1]) + (relu[2] + relu[3])) * A(0.25);
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
    Backward<T>{pooling(call),
                call.N,
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
