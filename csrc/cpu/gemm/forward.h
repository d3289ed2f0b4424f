// y [M, K] = h @ weight^T with the stats of y: the loop that norm_relu_conv1x1_forward and
// transition_forward share. `load(row, out)` makes row `row` of h, C elements padded to `depth`;
// stats are taken where they have data.
//
// A task is a group of row tiles. A tile of h and its product stay in the core's L2; the weight is
// packed once per call. Bytes moved: h's source once, y once.
#pragma once

#include "../rows/moments.h"
#include "product.h"

namespace densenet_efficient::cpu {

template <typename T, typename Load>
void product_forward(const Tensor& weight, int64_t M, Rows<T> y, Rows<Arithmetic<T>> stats,
                     const Load& load_row) {
  using A = Arithmetic<T>;
  using U = Unit<T>;
  const int64_t K = weight.size(0), C = weight.size(1), slots = threads();
  const tiling::ProductForward plan(M, C, K, sizeof(A), slots);
  Workspace workspace(weight, plan.bytes);
  const int64_t steps = plan.depth / kGroup<T>, width = tiling::pad(K);
  U* packed = workspace.take<U>(width * steps);
  Element<T>* operands = workspace.take<Element<T>>(slots * plan.operand);
  A* results = workspace.take<A>(slots * plan.result);
  GroupMoments moments(workspace, plan.groups.groups, K);
  A* spares = workspace.take<A>(slots * moments.kSpare * K);

  const T* w = static_cast<const T*>(weight.const_data_ptr());
  const int64_t row_stride = weight.stride(0), column_stride = weight.stride(1);
  parallel(ceil_div(K, kPanel<U>), [&](int64_t panel) {
    const int64_t first = panel * kPanel<U>;
    pack_panel<T>(w + first * row_stride, C, K - first, column_stride, row_stride,
                  packed + first * steps);
  });

  parallel(plan.groups.groups, [&](int64_t group) {
    const int64_t slot = own_slot(slots);
    Element<T>* operand = operands + slot * plan.operand;
    A* result = results + slot * plan.result;
    for (int64_t tile = plan.groups.first(group); tile < plan.groups.first(group + 1); ++tile) {
      const int64_t first = plan.tiles.first(tile), rows = plan.tiles.count(tile);
      for (int64_t r = 0; r < rows; ++r) load_row(first + r, operand + r * plan.depth);
      product(Product<U>{.m = rows,
                         .n = K,
                         .segments = 1,
                         .depth = ceil_div(C, kGroup<T>),
                         .a = reinterpret_cast<const U*>(operand),
                         .a_row = steps,
                         .a_step = 1,
                         .a_segment = 0,
                         .b = packed,
                         .b_panel = steps * kPanel<U>,
                         .b_step = kPanel<U>,
                         .b_segment = 0,
                         .c = result,
                         .c_row = width,
                         .accumulate = false});
      for (int64_t r = 0; r < rows; ++r) store_row<T>(result + r * width, K, y[first + r]);
      if (stats.data)
        moments.add<T>(group, {y[first], y.stride}, rows, spares + slot * moments.kSpare * K);
    }
  });
  if (stats.data) moments.finish(stats);
}

}  // namespace densenet_efficient::cpu
