// Both gradients of y [M, K] = h [M, C] @ weight^T: dh = dy @ weight and dweight = dy^T @ h, the loop
// that norm_relu_conv1x1_backward and transition_backward share. The caller makes the rows of dy and h
// and takes the rows of dh:
//   load_dy(row, out)                         row of dy, K elements padded to whole units
//   load_h(row, column, columns, padded, out) part of a row of h, zero up to `padded`
//   take_dh(row, column, columns, dh, sums)   part of a row of dh, its own to change; sums
//                                             [2][kColumns] of this tile
//
// A task is a group of row tiles and a range of columns. For a tile, dy is made once; then columns
// pass in blocks of kColumns: h, dh and the block's part of the weight gradient stay in the cache.
// Tile sums are added in double, groups in order.
#pragma once

#include "parallel.h"
#include "product.h"
#include "rows.h"

namespace densenet_efficient::cpu {

// Results of a backward pass; data null: not wanted.
template <typename A>
struct Gradients {
  A* dweight;       // [K, C], contiguous
  Rows<A> dnorm;    // [2, C]
  const A* rstd;    // [C], of the norm in front
};

template <typename T, typename LoadDy, typename LoadH, typename TakeDh>
void product_backward(const Tensor& weight, int64_t M, const Gradients<Arithmetic<T>>& out,
                      const LoadDy& load_dy, const LoadH& load_h, const TakeDh& take_dh) {
  using A = Arithmetic<T>;
  using U = Unit<T>;
  using E = Element<T>;
  constexpr int64_t group_size = kGroup<T>, kColumns = workspace::cpu::kColumns;
  const int64_t K = weight.size(0), C = weight.size(1), slots = threads();
  const workspace::cpu::ProductBackward plan(M, C, K, sizeof(A), slots);
  const int64_t groups = plan.groups.groups, steps = plan.depth / group_size;
  Workspace workspace(weight, plan.bytes);
  U* packed = workspace.take<U>(plan.columns * steps);
  E* dys = workspace.take<E>(slots * plan.dy);
  U* dy_units = workspace.take<U>(slots * plan.dy_units / group_size);
  U* operands = workspace.take<U>(slots * plan.operand / group_size);
  A* dhs = workspace.take<A>(slots * plan.dh);
  A* spares = workspace.take<A>(slots * 4 * kColumns);
  A* dweights = workspace.take<A>(groups * plan.dweight);
  double* sums = workspace.take_zeros<double>(groups * 2 * C);

  const T* w = static_cast<const T*>(weight.const_data_ptr());
  const int64_t row_stride = weight.stride(0), column_stride = weight.stride(1);
  parallel(plan.columns / kPanel<U>, [&](int64_t panel) {
    const int64_t first = panel * kPanel<U>;
    pack_panel<T>(w + first * column_stride, K, C - first, row_stride, column_stride,
                  packed + first * steps);
  });

  const int64_t blocks = ceil_div(C, kColumns);
  parallel(groups * plan.column_tasks, [&](int64_t task) {
    const int64_t slot = own_slot(slots);
    const int64_t group = task / plan.column_tasks, part = task % plan.column_tasks;
    const int64_t first_column = part * blocks / plan.column_tasks * kColumns;
    const int64_t last_column = std::min(C, (part + 1) * blocks / plan.column_tasks * kColumns);
    E* dy = dys + slot * plan.dy;
    U* dy_unit = dy_units + slot * (plan.dy_units / group_size);
    U* h = operands + slot * (plan.operand / group_size);
    A* dh = dhs + slot * plan.dh;
    A* tile_sums = spares + slot * 4 * kColumns;
    E* low = reinterpret_cast<E*>(tile_sums + 2 * kColumns);  // two rows of h, before they pair up
    E* high = low + kColumns;
    A* dweight = dweights + group * plan.dweight;
    if (out.dweight)
      for (int64_t k = 0; k < K; ++k)
        std::fill(dweight + k * plan.columns + first_column,
                  dweight + k * plan.columns +
                      std::min(plan.columns, round_up(last_column, workspace::cpu::kPad)),
                  A(0));

    for (int64_t tile = plan.groups.first(group); tile < plan.groups.first(group + 1); ++tile) {
      const int64_t first = plan.tiles.first(tile), rows = plan.tiles.count(tile);
      const int64_t row_units = ceil_div(rows, group_size);
      for (int64_t r = 0; r < rows; ++r) load_dy(first + r, dy + r * plan.depth);
      if (out.dweight && group_size > 1)
        for (int64_t r = 0; r < row_units; ++r) {
          const E* low = dy + group_size * r * plan.depth;
          interleave<T>(low, group_size * r + 1 < rows ? low + plan.depth : nullptr, K,
                        dy_unit + r * K);
        }

      for (int64_t column = first_column; column < last_column; column += kColumns) {
        const int64_t columns = std::min(kColumns, last_column - column);
        const int64_t width = workspace::cpu::pad(columns);
        product(Product<U>{.m = rows, .n = columns, .segments = 1,
                           .depth = ceil_div(K, group_size),
                           .a = reinterpret_cast<const U*>(dy), .a_row = steps, .a_step = 1,
                           .a_segment = 0,
                           .b = packed + column * steps, .b_panel = steps * kPanel<U>,
                           .b_step = kPanel<U>, .b_segment = 0,
                           .c = dh, .c_row = width, .accumulate = false});
        std::fill_n(tile_sums, 2 * kColumns, A(0));
        for (int64_t r = 0; r < rows; ++r)
          take_dh(first + r, column, columns, dh + r * width, tile_sums);
        add_to(tile_sums, columns, sums + 2 * group * C + column);
        add_to(tile_sums + kColumns, columns, sums + (2 * group + 1) * C + column);
        if (!out.dweight) continue;

        for (int64_t r = 0; r < row_units; ++r) {
          const int64_t row = first + group_size * r;
          if constexpr (group_size == 1) {
            load_h(row, column, columns, width, h + r * width);
          } else {
            const bool pair = group_size * r + 1 < rows;
            load_h(row, column, columns, width, low);
            if (pair) load_h(row + 1, column, columns, width, high);
            interleave<T>(low, pair ? high : nullptr, width, h + r * width);
          }
        }
        const bool by_rows = group_size == 1;  // dy itself, read transposed
        product(Product<U>{.m = K, .n = columns, .segments = 1, .depth = row_units,
                           .a = by_rows ? reinterpret_cast<const U*>(dy) : dy_unit, .a_row = 1,
                           .a_step = by_rows ? steps : K, .a_segment = 0,
                           .b = h, .b_panel = kPanel<U>, .b_step = width, .b_segment = 0,
                           .c = dweight + column, .c_row = plan.columns, .accumulate = true});
      }
    }
  });

  if (out.dnorm.data) finish_dnorm<A>(sums, groups, C, out.rstd, out.dnorm);
  if (out.dweight)
    parallel(K, [&](int64_t k) {
      sum_partials(dweights + k * plan.columns, groups, plan.dweight, C, out.dweight + k * C);
    });
}

}  // namespace densenet_efficient::cpu
