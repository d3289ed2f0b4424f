// Both gradients of y [M, K] = h [M, C] @ weight^T: dh = dy @ weight and dweight = dy^T @ h, the
// loop that norm_relu_conv1x1_backward and transition_backward share. The caller makes the rows of
// dy, takes dh and makes h:
//   load_dy(row, out)           row of dy, K elements padded to whole units
//   take(part, dh, sums, h)     dh [rows][width] of a part of a tile, its own to change; adds to
//                               sums [2][kColumns]; writes h, if not null, as units
//                               [rows / group][width]
//
// A task is a group of row tiles and a range of columns. For a tile, dy is made once; then columns
// pass in blocks of kColumns: h, dh and the block's part of the weight gradient stay in the cache.
// Tile sums are added in double, groups in order.
#pragma once

#include "../parallel.h"
#include "../rows/operands.h"
#include "../rows/tables.h"
#include "product.h"

namespace densenet_efficient::cpu {

// Results of a backward pass; data null: not wanted.
template <typename A>
struct Gradients {
  A* dweight;     // [K, C], contiguous
  Rows<A> dnorm;  // [2, C]
  const A* rstd;  // [C], of the norm in front
};

template <typename A, typename Call>
Gradients<A> gradients(const Call& call) {
  return {output_rows<A>(call.dweight).data, output_rows<A>(call.dnorm),
          input_rows<A>(call.norm)[kRstd]};
}

// Rows and columns of x that a block of dh belongs to.
struct Part {
  int64_t first_row, rows, column, columns, width;
};

template <typename T, typename LoadDy, typename Take>
void product_backward(const Tensor& weight, int64_t M, const Gradients<Arithmetic<T>>& out,
                      const LoadDy& load_dy, const Take& take) {
  using A = Arithmetic<T>;
  using U = Unit<T>;
  using E = Element<T>;
  constexpr int64_t group_size = kGroup<T>, kColumns = tiling::kColumns;
  const int64_t K = weight.size(0), C = weight.size(1), slots = threads();
  const tiling::ProductBackward plan(M, C, K, sizeof(A), slots);
  const int64_t groups = plan.groups.groups, steps = plan.depth / group_size;
  Workspace workspace(weight, plan.bytes);
  U* packed = workspace.take<U>(plan.columns * steps);
  E* dys = workspace.take<E>(slots * plan.dy);
  U* dy_units = workspace.take<U>(slots * plan.dy_units);
  U* operands = workspace.take<U>(slots * plan.operand / group_size);
  A* dhs = workspace.take<A>(slots * plan.dh);
  A* tile_sums = workspace.take<A>(slots * 2 * kColumns);
  A* dweights = workspace.take<A>(groups * plan.dweight);
  double* sums = workspace.take_zeros<double>(groups * 2 * C);

  const T* w = static_cast<const T*>(weight.const_data_ptr());
  const int64_t row_stride = weight.stride(0), column_stride = weight.stride(1);
  parallel(plan.columns / kPanel<U>, [&](int64_t panel) {
    const int64_t first = panel * kPanel<U>;
    pack_panel<T>(w + first * column_stride, K, C - first, row_stride, column_stride,
                  packed + first * steps);
  });

  parallel(groups * plan.column_tasks, [&](int64_t task) {
    const int64_t slot = own_slot(slots), group = task / plan.column_tasks;
    const int64_t first_column = plan.first_column(task % plan.column_tasks);
    const int64_t last_column = std::min(C, plan.first_column(task % plan.column_tasks + 1));
    E* dy = dys + slot * plan.dy;
    U* dy_unit = dy_units + slot * plan.dy_units;
    U* h = out.dweight ? operands + slot * (plan.operand / group_size) : nullptr;
    A* dh = dhs + slot * plan.dh;
    A* own_sums = tile_sums + slot * 2 * kColumns;
    A* dweight = dweights + group * plan.dweight;
    const int64_t first_tile = plan.groups.first(group);

    for (int64_t tile = first_tile; tile < plan.groups.first(group + 1); ++tile) {
      const int64_t first = plan.tiles.first(tile), rows = plan.tiles.count(tile);
      const int64_t row_units = ceil_div(rows, group_size);
      for (int64_t r = 0; r < rows; ++r) load_dy(first + r, dy + r * plan.depth);
      if (h && group_size > 1)
        for (int64_t r = 0; r < row_units; ++r) {
          const E* low = dy + group_size * r * plan.depth;
          interleave<T>(low, group_size * r + 1 < rows ? low + plan.depth : nullptr, K,
                        dy_unit + r * K);
        }

      for (int64_t column = first_column; column < last_column; column += kColumns) {
        const int64_t columns = std::min(kColumns, last_column - column);
        const int64_t width = tiling::pad(columns);
        product(Product<U>{.m = rows,
                           .n = columns,
                           .segments = 1,
                           .depth = ceil_div(K, group_size),
                           .a = reinterpret_cast<const U*>(dy),
                           .a_row = steps,
                           .a_step = 1,
                           .a_segment = 0,
                           .b = packed + column * steps,
                           .b_panel = steps * kPanel<U>,
                           .b_step = kPanel<U>,
                           .b_segment = 0,
                           .c = dh,
                           .c_row = width,
                           .accumulate = false});
        std::fill_n(own_sums, 2 * kColumns, A(0));
        take(Part{first, rows, column, columns, width}, dh, own_sums, h);
        add_to(own_sums, columns, sums + 2 * group * C + column);
        add_to(own_sums + kColumns, columns, sums + (2 * group + 1) * C + column);
        if (!h) continue;
        const bool by_rows = group_size == 1;  // dy itself, read transposed
        product(Product<U>{.m = K,
                           .n = columns,
                           .segments = 1,
                           .depth = row_units,
                           .a = by_rows ? reinterpret_cast<const U*>(dy) : dy_unit,
                           .a_row = 1,
                           .a_step = by_rows ? steps : K,
                           .a_segment = 0,
                           .b = h,
                           .b_panel = kPanel<U>,
                           .b_step = width,
                           .b_segment = 0,
                           .c = dweight + column,
                           .c_row = plan.columns,
                           .accumulate = tile > first_tile});
      }
    }
  });

  if (out.dnorm.data) finish_dnorm<A>(sums, groups, C, out.rstd, out.dnorm);
  if (!out.dweight) return;
  if (M == 0) return void(std::fill_n(out.dweight, K * C, A(0)));
  parallel(K, [&](int64_t k) {
    sum_partials(dweights + k * plan.columns, groups, plan.dweight, C, out.dweight + k * C);
  });
}

}  // namespace densenet_efficient::cpu
