// What both directions of the stem share: who owns which windows, and the maximum of an input row.
//
// A thread owns V neighbouring channels of one output column ow and walks down a band of output
// rows: the maximum of an input row serves two windows, so vertically x is read once; horizontally
// a third of the reads finds the neighbour's column in the L1 cache. A block is (lanes output
// columns) x (vectors of channels) of one band. Padding never wins: the ReLU's values are not
// negative, and zero takes no gradient.
#pragma once

#include "../launch.h"
#include "../tiling/pool.h"
#include "../vector.cuh"

namespace densenet_efficient {

using tiling::ColumnThread, tiling::kColumnThreads, tiling::StemTiling;

struct StemThread {
  int64_t image;
  int first, end;  // output rows
  int column;      // output column
  int channel;
  bool active;  // has a window column (perhaps the halo's)
  bool owner;
  ColumnThread at;

  __device__ __forceinline__ explicit StemThread(const StemTiling& plan)
      : at(plan.columns, device::thread_index(), device::block_y()) {
    const int tile = device::block_x() % plan.tiles;
    const int rest = device::block_x() / plan.tiles;
    image = rest / plan.bands;
    first = rest % plan.bands * plan.band_height;
    end = min(first + plan.band_height, plan.out_height);
    column = tile * plan.tile_width + at.lane;
    channel = at.channel;
    active = at.active && at.lane < plan.tile_width + plan.halo && column < plan.out_width;
    owner = active && at.lane < plan.tile_width;
  }
};

// Three neighbouring inputs 2 * column - 1 ... of one row; those outside are absent.
template <typename T, int V>
struct InputRow {
  Vector<T, V> x[3];
  bool present[3];

  __device__ __forceinline__ void load(const Rows<const T>& rows, const StemTiling& plan,
                                       const StemThread& at, int row DE_HERE) {
    const bool inside = at.active && row >= 0 && row < plan.height;
    const int64_t pixel = (at.image * plan.height + row) * plan.width + 2 * at.column - 1;
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      const int column = 2 * at.column - 1 + i;
      present[i] = inside && column >= 0 && column < plan.width;
      if (present[i]) x[i] = load_input<T, V>(rows[pixel + i] + at.channel DE_AT);
    }
  }
};

// The first maximum of one input row, or of several: the value after the ReLU (0 where there is
// none) and the window position or the input it came from.
template <typename A, typename Tag, int V>
struct Maximum {
  A value[V];
  Tag tag[V];

  __device__ __forceinline__ static Maximum none() {
    Maximum maximum;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      maximum.value[v] = A(0);
      maximum.tag[v] = Tag(0);
    }
    return maximum;
  }
  // Later candidates win only where they are larger; a NaN always wins.
  __device__ __forceinline__ void offer(int v, A candidate, Tag candidate_tag) {
    if (candidate > value[v] || candidate != candidate) {
      value[v] = candidate;
      tag[v] = candidate_tag;
    }
  }
};

template <typename T, typename Tag, int V, typename MakeTag>
__device__ __forceinline__ Maximum<Arithmetic<T>, Tag, V> row_maximum(
    const InputRow<T, V>& row, const Arithmetic<T> (&scale)[V], const Arithmetic<T> (&shift)[V],
    MakeTag make_tag) {
  using A = Arithmetic<T>;
  auto maximum = Maximum<A, Tag, V>::none();
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    if (!row.present[i]) continue;
    A x[V];
    unpack(row.x[i], x);
#pragma unroll
    for (int v = 0; v < V; ++v)
      maximum.offer(v, norm_relu(x[v], scale[v], shift[v]), make_tag(i, x[v]));
  }
  return maximum;
}

}  // namespace densenet_efficient
