// norm_relu_conv3x3: y [N, H, W, K] = conv3x3(relu(a * x + s), weight), padding 1, and its
// gradients.
//
// A tile is a band of image rows. Its operand is normalised once, with a halo of one pixel that is
// zero outside the image (the padding comes after the ReLU). The three pixels under a kernel row
// are neighbours in memory, so an output row is one product of W rows with 3 segments (kernel rows)
// of 3 * C steps: nothing is copied into columns.
//   forward    y[row] = h[row .. row + 2] * weight
//   backward   dh[row] = dy[row .. row + 2] * flipped weight; dz = dh * [a * x + s > 0]
//              dweight[tap] += dy^T h[shifted by tap], a reduction over the pixels of the band
// Where a unit holds two pixels of that reduction, they come from the upper and the lower half of
// the band: so both shift by a tap together. Bytes moved: x once (and dx once or twice), dy and y
// once, halos again. Tasks are groups of bands; partial sums merge in their order.
#include "gemm/product.h"
#include "rows/epilogue.h"
#include "rows/moments.h"
#include "rows/tables.h"

namespace densenet_efficient::cpu {
namespace {

// x [N, H, W, C] and its norm.
template <typename T>
struct Source {
  Rows<const T> x;
  Rows<const Arithmetic<T>> norm;
  int64_t N, H, W, C;

  // One image row of relu(a * x + s) with a zero pixel at either end, `columns` channels from
  // `column` on, each pixel padded to `width` elements; all zero outside the image.
  void halo_row(int64_t image, int64_t row, int64_t column, int64_t columns, int64_t width,
                Element<T>* out) const {
    if (row < 0 || row >= H) {
      std::fill_n(out, (W + 2) * width, Element<T>(0));
      return;
    }
    std::fill_n(out, width, Element<T>(0));
    std::fill_n(out + (W + 1) * width, width, Element<T>(0));
    for (int64_t w = 0; w < W; ++w)
      norm_relu_row<T>(x[(image * H + row) * W + w] + column, norm[kScale] + column,
                       norm[kShift] + column, columns, width, out + (w + 1) * width);
  }

  // The same as units of a reduction over pixels: `low` and, where a unit holds two, `high` are the
  // image rows side by side.
  void halo_row_units(int64_t image, int64_t low, int64_t high, int64_t column, int64_t columns,
                      int64_t width, Unit<T>* out) const {
    const int64_t rows[2] = {low, high};
    std::fill_n(out, width, Unit<T>(0));
    std::fill_n(out + (W + 1) * width, width, Unit<T>(0));
    for (int64_t w = 0; w < W; ++w) {
      const T* pixels[kGroup<T>];
      for (int64_t i = 0; i < kGroup<T>; ++i)
        pixels[i] =
            rows[i] < 0 || rows[i] >= H ? nullptr : x[(image * H + rows[i]) * W + w] + column;
      norm_relu_units<T>(pixels, norm[kScale] + column, norm[kShift] + column, columns, width,
                         out + (w + 1) * width);
    }
  }
};

// Packs weight [K, C, 3, 3]: panels of columns, 9 taps of whole units in each. Forward: columns are
// the outputs. Backward: columns are the inputs, the taps run backwards.
template <typename T>
void pack_taps(const Tensor& weight, bool backward, Unit<T>* packed) {
  constexpr int64_t panel_width = kPanel<Unit<T>>;
  const T* w = static_cast<const T*>(weight.const_data_ptr());
  const int64_t n_dim = backward ? 1 : 0, k_dim = backward ? 0 : 1;
  const int64_t columns = weight.size(n_dim), depth = weight.size(k_dim);
  const int64_t steps = ceil_div(depth, kGroup<T>);
  parallel(ceil_div(columns, panel_width) * 9, [&](int64_t task) {
    const int64_t first = task / 9 * panel_width, tap = task % 9;
    const int64_t from = backward ? 8 - tap : tap;
    pack_panel<T>(w + first * weight.stride(n_dim) + from / 3 * weight.stride(2) +
                      from % 3 * weight.stride(3),
                  depth, columns - first, weight.stride(k_dim), weight.stride(n_dim),
                  packed + first * 9 * steps + tap * steps * panel_width);
  });
}

// One output row: W pixels, all taps. `a` is the halo row above, `pitch` units to the next.
template <typename T>
Product<Unit<T>> row_product(const Unit<T>* a, int64_t pixels, int64_t steps, int64_t pitch,
                             const Unit<T>* packed, int64_t columns, Arithmetic<T>* c,
                             int64_t c_row) {
  constexpr int64_t panel = kPanel<Unit<T>>;
  return {.m = pixels,
          .n = columns,
          .segments = 3,
          .depth = 3 * steps,
          .a = a,
          .a_row = steps,
          .a_step = 1,
          .a_segment = pitch,
          .b = packed,
          .b_panel = 9 * steps * panel,
          .b_step = panel,
          .b_segment = 3 * steps * panel,
          .c = c,
          .c_row = c_row,
          .accumulate = false};
}

template <typename T>
void forward(const Source<T>& source, const Tensor& weight, Rows<T> y, Rows<Arithmetic<T>> stats) {
  using A = Arithmetic<T>;
  using U = Unit<T>;
  const int64_t H = source.H, W = source.W, C = source.C, K = weight.size(0), slots = threads();
  const tiling::Conv3x3Forward plan(source.N, H, W, C, K, sizeof(A), slots);
  Workspace workspace(weight, plan.bytes);
  const int64_t depth = round_up(C, kGroup<T>), steps = depth / kGroup<T>;
  const int64_t width = tiling::pad(K);
  U* packed = workspace.take<U>(plan.weight / kGroup<T>);
  Element<T>* operands = workspace.take<Element<T>>(slots * plan.operand);
  A* results = workspace.take<A>(slots * plan.result);
  GroupMoments moments(workspace, plan.groups.groups, K);
  A* spares = workspace.take<A>(slots * moments.kSpare * K);
  pack_taps<T>(weight, false, packed);

  parallel(plan.groups.groups, [&](int64_t group) {
    const int64_t slot = own_slot(slots);
    Element<T>* h = operands + slot * plan.operand;
    A* result = results + slot * plan.result;
    for (int64_t tile = plan.groups.first(group); tile < plan.groups.first(group + 1); ++tile) {
      const auto band = plan.bands.at(tile);
      for (int64_t r = 0; r < band.rows + 2; ++r)
        source.halo_row(band.image, band.first + r - 1, 0, C, depth, h + r * (W + 2) * depth);
      const U* units = reinterpret_cast<const U*>(h);
      const int64_t pitch = (W + 2) * steps;
      const int64_t first_pixel = (band.image * H + band.first) * W;
      for (int64_t r = 0; r < band.rows; ++r) {
        product(row_product<T>(units + r * pitch, W, steps, pitch, packed, K, result, width));
        for (int64_t w = 0; w < W; ++w)
          store_row<T>(result + w * width, K, y[first_pixel + r * W + w]);
      }
      if (stats.data)
        moments.add<T>(group, {y[first_pixel], y.stride}, band.rows * W,
                       spares + slot * moments.kSpare * K);
    }
  });
  if (stats.data) moments.finish(stats);
}

template <typename T>
struct Backward {
  using A = Arithmetic<T>;
  using U = Unit<T>;
  using E = Element<T>;
  static constexpr int64_t kGroupSize = kGroup<T>, kColumns = tiling::kColumns;

  Source<T> source;
  Rows<const T> dy, y;  // y.data null: dy is not corrected
  Rows<const A> correction;
  bool accumulate;
  Rows<T> dx;
  A* dweight;  // null: not wanted
  Rows<A> dnorm;

  void run(const Tensor& weight) const {
    const int64_t H = source.H, W = source.W, C = source.C, K = weight.size(0), slots = threads();
    const tiling::Conv3x3Backward plan(source.N, H, W, C, K, sizeof(A), slots);
    const int64_t groups = plan.groups.groups, depth = round_up(K, kGroupSize);
    Workspace workspace(weight, plan.bytes);
    U* packed = workspace.take<U>(plan.weight / kGroupSize);
    E* dys = workspace.take<E>(slots * plan.dy);
    U* dy_units = workspace.take<U>(slots * plan.dy_units / kGroupSize);
    U* operands = workspace.take<U>(slots * plan.operand);
    A* dhs = workspace.take<A>(slots * plan.dh);
    A* spares = workspace.take<A>(slots * 2 * kColumns);
    A* dweights = workspace.take<A>(groups * plan.dweight);
    double* sums = workspace.take_zeros<double>(groups * 2 * C);
    pack_taps<T>(weight, true, packed);

    parallel(groups, [&](int64_t group) {
      const int64_t slot = own_slot(slots);
      E* dy_halo = dys + slot * plan.dy;
      U* dy_unit = dy_units + slot * (plan.dy_units / kGroupSize);
      A* tile_sums = spares + slot * 2 * kColumns;
      A* partial = dweights + group * plan.dweight;
      for (int64_t tile = plan.groups.first(group); tile < plan.groups.first(group + 1); ++tile) {
        const auto band = plan.bands.at(tile);
        for (int64_t r = 0; r < band.rows + 2; ++r)
          dy_halo_row(band.image, band.first + r - 1, K, depth, dy_halo + r * (W + 2) * depth);
        if (dweight && kGroupSize > 1) make_dy_units(dy_halo, band.rows, K, depth, dy_unit);
        for (int64_t column = 0; column < C; column += kColumns) {
          const int64_t columns = std::min(kColumns, C - column);
          std::fill_n(tile_sums, 2 * kColumns, A(0));
          data_gradient(band, column, columns, depth / kGroupSize, dy_halo, packed,
                        dhs + slot * plan.dh, tile_sums);
          add_to(tile_sums, columns, sums + 2 * group * C + column);
          add_to(tile_sums + kColumns, columns, sums + (2 * group + 1) * C + column);
          if (dweight)
            weight_gradient(band, column, columns, K, depth, dy_halo, dy_unit,
                            operands + slot * plan.operand, plan.columns, partial,
                            tile > plan.groups.first(group));
        }
      }
    });

    finish_dnorm<A>(sums, groups, C, source.norm[kRstd], dnorm);
    if (!dweight) return;
    if (plan.bands.tiles() == 0) return void(std::fill_n(dweight, K * C * 9, A(0)));
    A* rows = dhs;  // dh is done with: a row of sums per thread
    parallel(K, [&](int64_t k) {
      A* row = rows + own_slot(slots) * C;
      for (int64_t tap = 0; tap < 9; ++tap) {
        sum_partials(dweights + (tap * K + k) * plan.columns, groups, plan.dweight, C, row);
        for (int64_t c = 0; c < C; ++c) dweight[(k * C + c) * 9 + tap] = row[c];
      }
    });
  }

 private:
  // One image row of dy, corrected, between two zero pixels; all zero outside the image.
  void dy_halo_row(int64_t image, int64_t row, int64_t K, int64_t depth, E* out) const {
    const int64_t W = source.W;
    if (row < 0 || row >= source.H) {
      std::fill_n(out, (W + 2) * depth, E(0));
      return;
    }
    std::fill_n(out, depth, E(0));
    std::fill_n(out + (W + 1) * depth, depth, E(0));
    for (int64_t w = 0; w < W; ++w) {
      const int64_t pixel = (image * source.H + row) * W + w;
      dy_row<T, true>(dy[pixel], y.data ? y[pixel] : nullptr, correction, K, depth,
                      out + (w + 1) * depth, static_cast<uint32_t>(pixel * K));
    }
  }

  // Pixels of the upper half of the band next to those of the lower half: [half][W][K] units.
  void make_dy_units(const E* dy_halo, int64_t rows, int64_t K, int64_t depth, U* out) const {
    const int64_t W = source.W, half = ceil_div(rows, kGroupSize);
    for (int64_t r = 0; r < half; ++r)
      for (int64_t w = 0; w < W; ++w) {
        const E* low = dy_halo + ((r + 1) * (W + 2) + w + 1) * depth;
        const E* high = r + half < rows ? low + half * (W + 2) * depth : nullptr;
        interleave<T>(low, high, K, out + (r * W + w) * K);
      }
  }

  template <typename Band>
  void data_gradient(const Band& band, int64_t column, int64_t columns, int64_t steps,
                     const E* dy_halo, const U* packed, A* dh, A* sums) const {
    const int64_t W = source.W, width = tiling::pad(columns), pitch = (W + 2) * steps;
    for (int64_t r = 0; r < band.rows; ++r) {
      product(row_product<T>(reinterpret_cast<const U*>(dy_halo) + r * pitch, W, steps, pitch,
                             packed + column * 9 * steps, columns, dh, width));
      const int64_t pixel = (band.image * source.H + band.first + r) * W;
      const auto take = accumulate ? data_gradient_epilogue<T, Epilogue::kAdd>
                                   : data_gradient_epilogue<T, Epilogue::kWrite>;
      take(dh, width, {source.x[pixel], source.x.stride}, source.norm, column, columns, W,
           {dx[pixel], dx.stride}, sums, sums + kColumns, nullptr);
    }
  }

  template <typename Band>
  void weight_gradient(const Band& band, int64_t column, int64_t columns, int64_t K, int64_t depth,
                       const E* dy_halo, const U* dy_unit, U* h, int64_t c_row, A* partial,
                       bool add) const {
    const int64_t W = source.W, width = tiling::pad(columns);
    const int64_t half = ceil_div(band.rows, kGroupSize), pitch = (W + 2) * width;
    for (int64_t r = 0; r < half + 2; ++r)
      source.halo_row_units(band.image, band.first + r - 1,
                            r + half < band.rows + 2 ? band.first + r - 1 + half : -1, column,
                            columns, width, h + r * pitch);
    const bool by_rows = kGroupSize == 1;  // dy itself, read transposed
    const U* a = by_rows ? reinterpret_cast<const U*>(dy_halo + (W + 3) * depth) : dy_unit;
    for (int64_t tap = 0; tap < 9; ++tap)
      product(Product<U>{.m = K,
                         .n = columns,
                         .segments = half,
                         .depth = W,
                         .a = a,
                         .a_row = 1,
                         .a_step = by_rows ? depth : K,
                         .a_segment = by_rows ? (W + 2) * depth : W * K,
                         .b = h + (tap / 3 * (W + 2) + tap % 3) * width,
                         .b_panel = kPanel<U>,
                         .b_step = width,
                         .b_segment = pitch,
                         .c = partial + tap * K * c_row + column,
                         .c_row = c_row,
                         .accumulate = add});
  }
};

template <typename T, typename Call>
Source<T> source(const Call& call) {
  return {
      input_rows<T>(call.x), input_rows<Arithmetic<T>>(call.norm), call.N, call.H, call.W, call.C};
}

void norm_relu_conv3x3_forward(Tensor x, Tensor norm, Tensor weight, Tensor y,
                               OptionalTensor stats) {
  const arguments::NormReluConv3x3Forward call(x, norm, weight, y, stats);
  dispatch_activation(x.scalar_type(), [&]<typename T>(T) {
    forward<T>(source<T>(call), weight, output_rows<T>(call.y),
               output_rows<Arithmetic<T>>(call.stats));
  });
}

void norm_relu_conv3x3_backward(Tensor dy, OptionalTensor y, OptionalTensor correction, Tensor x,
                                Tensor norm, Tensor weight, bool accumulate, Tensor dx,
                                OptionalTensor dweight, Tensor dnorm) {
  const arguments::NormReluConv3x3Backward call(dy, y, correction, x, norm, weight, dx, dweight,
                                                dnorm);
  dispatch_activation(x.scalar_type(), [&]<typename T>(T) {
    using A = Arithmetic<T>;
    Backward<T>{source<T>(call),
                input_rows<T>(call.dy),
                input_rows<T>(call.y),
                input_rows<A>(call.correction),
                accumulate,
                output_rows<T>(call.dx),
                output_rows<A>(call.dweight).data,
                output_rows<A>(call.dnorm)}
        .run(weight);
  });
}

}  // namespace
}  // namespace densenet_efficient::cpu

STABLE_TORCH_LIBRARY_IMPL(densenet_efficient, CPU, library) {
  library.impl("norm_relu_conv3x3_forward",
               TORCH_BOX(&densenet_efficient::cpu::norm_relu_conv3x3_forward));
  library.impl("norm_relu_conv3x3_backward",
               TORCH_BOX(&densenet_efficient::cpu::norm_relu_conv3x3_backward));
}
