// norm_relu_conv3x3: y [N, *spatial, K] = conv3x3(relu(a * x + s), weight), padding 1, and its
// gradients, for images of one, two or three dimensions.
//
// A tile is a band of image rows. Its operand is normalised once, with a halo of one pixel that is
// zero outside the image (the padding comes after the ReLU). The three pixels under a kernel row
// are neighbours in memory, and in three dimensions the kernel's planes are: a row of the halo is
// followed by the same row of the next plane. So an output row is one product of W rows with a
// segment of 3 * C steps for each row of the kernel: nothing is copied into columns.
//   forward    y[row] = h[row .. row + 2] * weight
//   backward   dh[row] = dy[row .. row + 2] * flipped weight; dz = dh * [a * x + s > 0]
//              dweight[tap] += dy^T h[shifted by tap], a reduction over the pixels of the band
// Where a unit holds two pixels of that reduction, they come from the upper and the lower half of
// the band: so both shift by a tap together. One dimension is an image of one column, whose rows
// need no halo between them: one product serves the band. Bytes moved: x once (and dx once or
// twice), dy and y once, halos again. Tasks are groups of bands; partial sums merge in their order.
#include "gemm/product.h"
#include "rows/epilogue.h"
#include "rows/halo.h"
#include "rows/moments.h"
#include "rows/tables.h"

namespace densenet_efficient::cpu {
namespace {

// Packs weight [K, C, *kernel]: panels of columns, all taps of whole units in each. Forward:
// columns are the outputs. Backward: columns are the inputs, the taps run backwards.
template <typename T>
void pack_taps(const Tensor& weight, const Taps& taps, bool backward, Unit<T>* packed) {
  constexpr int64_t panel_width = kPanel<Unit<T>>;
  const T* w = static_cast<const T*>(weight.const_data_ptr());
  const int64_t n_dim = backward ? 1 : 0, k_dim = backward ? 0 : 1, last = weight.dim() - 1;
  const int64_t columns = weight.size(n_dim), depth = weight.size(k_dim);
  const int64_t steps = ceil_div(depth, kGroup<T>);
  const int64_t row = weight.stride(taps.kernel.width > 1 ? last - 1 : last);
  parallel(ceil_div(columns, panel_width) * taps.count, [&](int64_t task) {
    const int64_t first = task / taps.count * panel_width, tap = task % taps.count;
    const int64_t from = backward ? taps.count - 1 - tap : tap;
    pack_panel<T>(w + first * weight.stride(n_dim) +
                      taps.offset(from, weight.stride(2), row, weight.stride(last)),
                  depth, columns - first, weight.stride(k_dim), weight.stride(n_dim),
                  packed + first * taps.count * steps + tap * steps * panel_width);
  });
}

// Pixels of a row, or of joined rows, all taps. `a` is the halo above, `pitch` units to its next
// row.
template <typename T>
Product<Unit<T>> row_product(const Taps& taps, const Unit<T>* a, int64_t pixels, int64_t steps,
                             int64_t pitch, const Unit<T>* packed, int64_t columns,
                             Arithmetic<T>* c, int64_t c_row) {
  constexpr int64_t panel = kPanel<Unit<T>>;
  const int64_t width = taps.kernel.width;
  return {.m = pixels,
          .n = columns,
          .segments = taps.count / width,
          .depth = width * steps,
          .a = a,
          .a_row = steps,
          .a_step = 1,
          .a_segment = pitch,
          .b = packed,
          .b_panel = taps.count * steps * panel,
          .b_step = panel,
          .b_segment = width * steps * panel,
          .c = c,
          .c_row = c_row,
          .accumulate = false};
}

template <typename T>
void forward(const Source<T>& source, const Tensor& weight, Rows<T> y, Rows<Arithmetic<T>> stats) {
  using A = Arithmetic<T>;
  using U = Unit<T>;
  const int64_t W = source.of.W, C = source.C, K = weight.size(0), slots = threads();
  const tiling::Conv3x3Forward plan(source.of, C, K, sizeof(A), slots);
  const Window kernel = plan.bands.kernel;
  const Taps taps{kernel};
  Workspace workspace(weight, plan.bytes);
  const int64_t depth = round_up(C, kGroup<T>), steps = depth / kGroup<T>;
  const int64_t width = tiling::pad(K);
  U* packed = workspace.take<U>(plan.weight / kGroup<T>);
  Element<T>* operands = workspace.take<Element<T>>(slots * plan.operand);
  A* results = workspace.take<A>(slots * plan.result);
  GroupMoments moments(workspace, plan.groups.groups, K);
  A* spares = workspace.take<A>(slots * moments.kSpare * K);
  pack_taps<T>(weight, taps, false, packed);

  parallel(plan.groups.groups, [&](int64_t group) {
    const int64_t slot = own_slot(slots);
    Element<T>* h = operands + slot * plan.operand;
    A* result = results + slot * plan.result;
    for (int64_t tile = plan.groups.first(group); tile < plan.groups.first(group + 1); ++tile) {
      const auto band = plan.bands.at(tile);
      const int64_t first_pixel = source.pixel(band.image, band.plane, band.first);
      halo_rows(kernel, band.plane, band.first, band.rows,
                [&](int64_t r, int64_t plane, int64_t row) {
                  source.halo_row(band.image, plane, row, depth, h + r * plan.width * depth);
                });
      const U* units = reinterpret_cast<const U*>(h);
      const int64_t pitch = plan.width * steps, joined = plan.bands.joined_rows();
      for (int64_t r = 0; r < band.rows; r += joined) {
        const int64_t pixels = std::min(joined, band.rows - r) * W;
        product(row_product<T>(taps, units + r * kernel.depth * pitch, pixels, steps, pitch, packed,
                               K, result, width));
        for (int64_t w = 0; w < pixels; ++w)
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
  int64_t channel_step, tap_step;
  Rows<A> dnorm;

  void run(const Tensor& weight) const {
    const int64_t C = source.C, K = weight.size(0), slots = threads();
    const tiling::Conv3x3Backward plan(source.of, C, K, sizeof(A), slots);
    const Taps taps{plan.bands.kernel};
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
    pack_taps<T>(weight, taps, true, packed);

    parallel(groups, [&](int64_t group) {
      const int64_t slot = own_slot(slots);
      E* dy_halo = dys + slot * plan.dy;
      U* dy_unit = dy_units + slot * (plan.dy_units / kGroupSize);
      A* tile_sums = spares + slot * 2 * kColumns;
      A* partial = dweights + group * plan.dweight;
      for (int64_t tile = plan.groups.first(group); tile < plan.groups.first(group + 1); ++tile) {
        const auto band = plan.bands.at(tile);
        halo_rows(taps.kernel, band.plane, band.first, band.rows,
                  [&](int64_t r, int64_t plane, int64_t row) {
                    dy_halo_row(band.image, plane, row, K, depth, dy_halo + r * plan.width * depth);
                  });
        const E* dy_own = dy_halo + first_own_pixel(plan) * depth;
        if (dweight && kGroupSize > 1) make_dy_units(plan, dy_own, band.rows, K, depth, dy_unit);
        for (int64_t column = 0; column < C; column += kColumns) {
          const int64_t columns = std::min(kColumns, C - column);
          std::fill_n(tile_sums, 2 * kColumns, A(0));
          data_gradient(plan, taps, band, column, columns, depth / kGroupSize, dy_halo, packed,
                        dhs + slot * plan.dh, tile_sums);
          add_to(tile_sums, columns, sums + 2 * group * C + column);
          add_to(tile_sums + kColumns, columns, sums + (2 * group + 1) * C + column);
          if (dweight)
            weight_gradient(plan, taps, band, column, columns, K, depth, dy_own, dy_unit,
                            operands + slot * plan.operand, partial,
                            tile > plan.groups.first(group));
        }
      }
    });

    finish_dnorm<A>(sums, groups, C, source.norm[kRstd], dnorm);
    if (!dweight) return;
    if (plan.bands.tiles() == 0) return void(std::fill_n(dweight, K * C * taps.count, A(0)));
    A* rows = dhs;  // dh is done with: a row of sums per thread
    parallel(K, [&](int64_t k) {
      A* row = rows + own_slot(slots) * C;
      for (int64_t tap = 0; tap < taps.count; ++tap) {
        sum_partials(dweights + (tap * K + k) * plan.columns, groups, plan.dweight, C, row);
        A* to = dweight + k * C * taps.count + taps.position(tap) * tap_step;
        for (int64_t c = 0; c < C; ++c) to[c * channel_step] = row[c];
      }
    });
  }

 private:
  using Plan = tiling::Conv3x3Backward;
  using Band = tiling::Bands::Band;

  // Of the band itself, in the halo around it.
  int64_t first_own_pixel(const Plan& plan) const {
    const Window& kernel = plan.bands.kernel;
    return (kernel.height / 2 * kernel.depth + kernel.depth / 2) * plan.width + source.margin();
  }

  // One image row of dy, corrected, between its margins; all zero outside the image.
  void dy_halo_row(int64_t image, int64_t plane, int64_t row, int64_t K, int64_t depth,
                   E* out) const {
    const int64_t W = source.of.W, margin = source.margin() * depth;
    if (!source.inside(plane, row)) return void(std::fill_n(out, W * depth + 2 * margin, E(0)));
    std::fill_n(out, margin, E(0));
    std::fill_n(out + margin + W * depth, margin, E(0));
    const int64_t at = source.pixel(image, plane, row);
    for (int64_t w = 0; w < W; ++w)
      dy_row<T, true>(dy[at + w], y.data ? y[at + w] : nullptr, correction, K, depth,
                      out + margin + w * depth, static_cast<uint32_t>((at + w) * K));
  }

  // Pixels of the upper half of the band next to those of the lower half: [half][W][K] units.
  void make_dy_units(const Plan& plan, const E* dy_own, int64_t rows, int64_t K, int64_t depth,
                     U* out) const {
    const int64_t W = source.of.W, half = ceil_div(rows, kGroupSize);
    const int64_t next = plan.bands.kernel.depth * plan.width * depth;
    for (int64_t r = 0; r < half; ++r)
      for (int64_t w = 0; w < W; ++w) {
        const E* low = dy_own + r * next + w * depth;
        const E* high = r + half < rows ? low + half * next : nullptr;
        interleave<T>(low, high, K, out + (r * W + w) * K);
      }
  }

  void data_gradient(const Plan& plan, const Taps& taps, const Band& band, int64_t column,
                     int64_t columns, int64_t steps, const E* dy_halo, const U* packed, A* dh,
                     A* sums) const {
    const int64_t W = source.of.W, width = tiling::pad(columns), pitch = plan.width * steps;
    const int64_t joined = plan.bands.joined_rows();
    const int64_t first_pixel = source.pixel(band.image, band.plane, band.first);
    for (int64_t r = 0; r < band.rows; r += joined) {
      const int64_t pixels = std::min(joined, band.rows - r) * W, pixel = first_pixel + r * W;
      product(row_product<T>(
          taps, reinterpret_cast<const U*>(dy_halo) + r * taps.kernel.depth * pitch, pixels, steps,
          pitch, packed + column * taps.count * steps, columns, dh, width));
      const auto take = accumulate ? data_gradient_epilogue<T, Epilogue::kAdd>
                                   : data_gradient_epilogue<T, Epilogue::kWrite>;
      take(dh, width, {source.x[pixel], source.x.stride}, source.norm, column, columns, pixels,
           {dx[pixel], dx.stride}, sums, sums + kColumns, nullptr);
    }
  }

  void weight_gradient(const Plan& plan, const Taps& taps, const Band& band, int64_t column,
                       int64_t columns, int64_t K, int64_t depth, const E* dy_own, const U* dy_unit,
                       U* h, A* partial, bool add) const {
    const int64_t W = source.of.W, width = tiling::pad(columns);
    const int64_t half = ceil_div(band.rows, kGroupSize), pitch = plan.width * width;
    const int64_t last = band.first + band.rows;
    halo_rows(taps.kernel, band.plane, band.first, half,
              [&](int64_t r, int64_t plane, int64_t row) {
                source.halo_row_units(band.image, plane, row, row + half <= last ? row + half : -1,
                                      column, columns, width, h + r * pitch);
              });
    const bool by_rows = kGroupSize == 1;  // dy itself, read transposed
    const U* a = by_rows ? reinterpret_cast<const U*>(dy_own) : dy_unit;
    const bool joined = plan.bands.joined_rows() > 1;  // one long segment
    for (int64_t tap = 0; tap < taps.count; ++tap) {
      const int64_t row = taps.row(tap) * taps.kernel.depth + taps.plane(tap);
      product(Product<U>{.m = K,
                         .n = columns,
                         .segments = joined ? 1 : half,
                         .depth = joined ? half : W,
                         .a = a,
                         .a_row = 1,
                         .a_step = by_rows ? depth : K,
                         .a_segment = by_rows ? taps.kernel.depth * plan.width * depth : W * K,
                         .b = h + row * pitch + taps.column(tap) * width,
                         .b_panel = kPanel<U>,
                         .b_step = width,
                         .b_segment = taps.kernel.depth * pitch,
                         .c = partial + tap * K * plan.columns + column,
                         .c_row = plan.columns,
                         .accumulate = add});
    }
  }
};

template <typename T, typename Call>
Source<T> source(const Call& call) {
  return {input_rows<T>(call.x), input_rows<Arithmetic<T>>(call.norm), call, call.C};
}

void norm_relu_conv3x3_forward(Tensor x, Tensor norm, Tensor weight, Tensor y, OptionalTensor stats,
                               OptionalTensor next_stats, OptionalTensor next_gamma,
                               OptionalTensor next_beta, double next_eps,
                               OptionalTensor next_norm) {
  const arguments::NormReluConv3x3Forward call(
      x, norm, weight, y, stats, {next_stats, next_gamma, next_beta, next_eps, next_norm});
  dispatch_activation(x.scalar_type(), [&]<typename T>(T) {
    forward<T>(source<T>(call), weight, output_rows<T>(call.y),
               output_rows<Arithmetic<T>>(call.stats));
    fold_next<Arithmetic<T>>(call.next);
  });
}

void norm_relu_conv3x3_backward(Tensor dy, OptionalTensor y, OptionalTensor correction, Tensor x,
                                Tensor norm, Tensor weight, bool accumulate, Tensor dx,
                                OptionalTensor dweight, Tensor dnorm, int64_t count,
                                OptionalTensor x_correction) {
  const arguments::NormReluConv3x3Backward call(dy, y, correction, x, norm, weight, accumulate, dx,
                                                dweight, dnorm, count, x_correction);
  dispatch_activation(x.scalar_type(), [&]<typename T>(T) {
    using A = Arithmetic<T>;
    Backward<T>{source<T>(call),
                input_rows<T>(call.dy),
                input_rows<T>(call.y),
                input_rows<A>(call.correction),
                accumulate,
                output_rows<T>(call.dx),
                output_rows<A>(call.dweight).data,
                call.dweight.channel,
                call.dweight.tap,
                output_rows<A>(call.dnorm)}
        .run(weight);
    correct_x<A>(call, accumulate);
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
