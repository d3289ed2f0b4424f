// The product on tiles (see product.h): one block of rows x 2 vectors of columns lives in registers
// while all its steps run. A step loads 2 vectors of b, broadcasts one unit of a per row and does
// 2 multiply-adds per row: with 14 rows and 512-bit vectors, 28 accumulators of the 32 registers.
#include "product.h"

#include <algorithm>
#include <array>
#include <limits>
#include <utility>

#include "../vector.h"

namespace densenet_efficient::cpu {
namespace {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kMaxRows = 14;  // 32 vector registers
#else
constexpr int kMaxRows = 6;  // 16 vector registers
#endif

template <typename A>
inline Vector<A> multiply_add(A a, Vector<A> b, Vector<A> c) {
  return c + a * b;
}

#if defined(__AVX512BF16__)
inline Vector<float> multiply_add(uint32_t a, Vector<uint32_t> b, Vector<float> c) {
  return (Vector<float>)_mm512_dpbf16_ps(
      (__m512)c, (__m512bh)_mm512_set1_epi32(static_cast<int>(a)), (__m512bh)b);
}
#else
inline Vector<float> multiply_add(uint32_t, Vector<uint32_t>, Vector<float> c) { return c; }
#endif

// Steps that are summed in registers before they are added to c. One chain of a thousand float32
// additions loses twice the digits of PyTorch's convolutions, which sum in blocks; bfloat16
// operands are rounded far more coarsely than their sums.
template <typename U>
constexpr int64_t kChain = std::is_same_v<U, float> ? 128 : std::numeric_limits<int64_t>::max();

// One block: R rows x V vectors. Transposed: the rows of a are neighbours; otherwise its steps are.
template <typename U, int R, int V, bool Transposed>
void block(const Product<U>& p, const U* a, const U* b, Accumulator<U>* c) {
  using A = Accumulator<U>;
  constexpr int64_t lanes = kVectorBytes / sizeof(A);
  const int64_t a_row = Transposed ? 1 : p.a_row, a_step = Transposed ? p.a_step : 1;
  const int64_t b_step = p.b_step;
  bool add = p.accumulate;
  for (int64_t g = 0; g < p.segments; ++g) {
    const U* a_at = a + g * p.a_segment;
    const U* b_at = b + g * p.b_segment;
    int64_t first = 0;
    do {
      Vector<A> sum[R][V] = {};
      for (int64_t k = std::min(kChain<U>, p.depth - first); k > 0;
           --k, a_at += a_step, b_at += b_step) {
        Vector<U> column[V];
        for (int v = 0; v < V; ++v) column[v] = read<Vector<U>>(b_at + v * lanes);
        for (int r = 0; r < R; ++r) {
          const U value = a_at[r * a_row];
          for (int v = 0; v < V; ++v) sum[r][v] = multiply_add(value, column[v], sum[r][v]);
        }
      }
      for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) {
          A* to = c + r * p.c_row + v * lanes;
          if (add) sum[r][v] += read<Vector<A>>(to);
          std::memcpy(to, &sum[r][v], sizeof(Vector<A>));
        }
      add = true;
      first += kChain<U>;
    } while (first < p.depth);
  }
}

template <typename U>
using Block = void (*)(const Product<U>&, const U*, const U*, Accumulator<U>*);

template <typename U, int V, bool Transposed, int... R>
constexpr std::array<Block<U>, sizeof...(R)> blocks(std::integer_sequence<int, R...>) {
  return {&block<U, R + 1, V, Transposed>...};
}

}  // namespace

template <typename U>
void product(const Product<U>& p) {
  using A = Accumulator<U>;
  constexpr int64_t lanes = kVectorBytes / sizeof(A);
  using Rows = std::make_integer_sequence<int, kMaxRows>;
  static constexpr std::array<Block<U>, kMaxRows> table[2][2] = {
      {blocks<U, 1, false>(Rows{}), blocks<U, 2, false>(Rows{})},
      {blocks<U, 1, true>(Rows{}), blocks<U, 2, true>(Rows{})}};
  const bool transposed = p.a_step != 1;
  // Rows are shared out evenly: 32 rows make 11 + 11 + 10, not 14 + 14 + 4.
  const int64_t count = ceil_div(p.m, kMaxRows);
  for (int64_t column = 0; column < p.n; column += kPanel<U>) {
    const auto& kernels = table[transposed][p.n - column > lanes];
    const U* b = p.b + column / kPanel<U> * p.b_panel;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t first = i * p.m / count, rows = (i + 1) * p.m / count - first;
      kernels[rows - 1](p, p.a + first * p.a_row, b, p.c + first * p.c_row + column);
    }
  }
}

template <typename T>
inline Element<T> weight_element(const T& value) {
  if constexpr (std::is_same_v<T, BFloat16> && std::is_same_v<Element<T>, uint16_t>)
    return value.x;
  else
    return element<T>(load(value));
}

template <typename T>
void pack_panel(const T* weight, int64_t depth, int64_t n, int64_t k_stride, int64_t n_stride,
                Unit<T>* panel) {
  constexpr int64_t group = kGroup<T>, width = kPanel<Unit<T>>;
  const int64_t steps = ceil_div(depth, group), columns = std::min(n, width);
  if (n < width || depth % group) std::fill_n(panel, steps * width, Unit<T>(0));
  auto* out = reinterpret_cast<Element<T>*>(panel);
  if (n_stride == 1) {  // rows of the weight are rows of the panel
    for (int64_t k = 0; k < depth; ++k) {
      const T* __restrict from = weight + k * k_stride;
      Element<T>* __restrict to = out + k / group * width * group + k % group;
      for (int64_t j = 0; j < columns; ++j) to[j * group] = weight_element(from[j]);
    }
    return;
  }
  // Blocks along the reduction: the cache lines of 32 columns of the weight are used up at once.
  constexpr int64_t kBlock = 16;
  for (int64_t k0 = 0; k0 < depth; k0 += kBlock) {
    const int64_t block = std::min(kBlock, depth - k0);
    for (int64_t j = 0; j < columns; ++j) {
      const T* __restrict from = weight + k0 * k_stride + j * n_stride;
      Element<T>* __restrict to = out + (k0 / group * width + j) * group;
      for (int64_t k = 0; k < block; ++k)
        to[k / group * width * group + k % group] = weight_element(from[k * k_stride]);
    }
  }
}

template void product(const Product<double>&);
template void product(const Product<float>&);
template void product(const Product<uint32_t>&);
template void pack_panel(const double*, int64_t, int64_t, int64_t, int64_t, Unit<double>*);
template void pack_panel(const float*, int64_t, int64_t, int64_t, int64_t, Unit<float>*);
template void pack_panel(const Half*, int64_t, int64_t, int64_t, int64_t, Unit<Half>*);
template void pack_panel(const BFloat16*, int64_t, int64_t, int64_t, int64_t, Unit<BFloat16>*);

}  // namespace densenet_efficient::cpu
