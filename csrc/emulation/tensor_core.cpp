// What the tensor cores compute once all 32 lanes have brought their operands: matrices are
// gathered from the lanes' registers, multiplied, and scattered again. The layouts are those of
// cuda/device.cuh.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <bit>
#include <cmath>
#include <cstring>

#include "machine.h"

namespace densenet_efficient::emulation {

// Lanes 8i..8i+7 name the rows of matrix i.
void combine_ldmatrix(void* const* inputs, void* const* outputs, int argument) {
  const int matrices = argument < 0 ? -argument : argument;
  for (int matrix = 0; matrix < matrices; ++matrix) {
    uint16_t rows[8][8];
    for (int row = 0; row < 8; ++row)
      std::memcpy(rows[row], *static_cast<const void* const*>(inputs[8 * matrix + row]), 16);
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = 2 * (lane % 4);
      const uint16_t low = argument < 0 ? rows[t][g] : rows[g][t];
      const uint16_t high = argument < 0 ? rows[t + 1][g] : rows[g][t + 1];
      static_cast<uint32_t*>(outputs[lane])[matrix] = low | uint32_t(high) << 16;
    }
  }
}

void combine_transpose(void* const* inputs, void* const* outputs, int) {
  const auto at = [&](int row, int column) {
    const uint32_t word = *static_cast<const uint32_t*>(inputs[4 * row + column / 2]);
    return word >> 16 * (column % 2) & 0xffffu;
  };
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = 2 * (lane % 4);
    *static_cast<uint32_t*>(outputs[lane]) = at(t, g) | at(t + 1, g) << 16;
  }
}
namespace {

using BFloat16 = torch::headeronly::BFloat16;
using Half = torch::headeronly::Half;

template <typename T>
void unpack(uint32_t pair, float* values) {
  values[0] = static_cast<float>(T(static_cast<uint16_t>(pair), T::from_bits()));
  values[1] = static_cast<float>(T(static_cast<uint16_t>(pair >> 16), T::from_bits()));
}

// Depth: 16 for two 16-bit values in a register, 8 for one TF32 value.
template <typename T, int Depth>
void combine_mma(void* const* inputs, void* const* outputs) {
  float a[16][Depth], b[Depth][8];
  for (int lane = 0; lane < 32; ++lane) {
    const MmaOperands& operands = *static_cast<const MmaOperands*>(inputs[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      const int row = g + 8 * (i & 1);
      if constexpr (Depth == 16) {
        unpack<T>(operands.a[i], &a[row][2 * t + 8 * (i >> 1)]);
      } else {
        a[row][t + 4 * (i >> 1)] = std::bit_cast<float>(operands.a[i]);
      }
    }
    for (int i = 0; i < 2; ++i) {
      if constexpr (Depth == 16) {
        float pair[2];
        unpack<T>(operands.b[i], pair);
        b[2 * t + 8 * i][g] = pair[0];
        b[2 * t + 8 * i + 1][g] = pair[1];
      } else {
        b[t + 4 * i][g] = std::bit_cast<float>(operands.b[i]);
      }
    }
  }
  float d[16][8];
  for (int row = 0; row < 16; ++row) {
    for (int col = 0; col < 8; ++col) d[row][col] = 0.0f;
    for (int depth = 0; depth < Depth; ++depth)
      for (int col = 0; col < 8; ++col) d[row][col] += a[row][depth] * b[depth][col];
  }
  for (int lane = 0; lane < 32; ++lane) {
    float* out = static_cast<float*>(outputs[lane]);
    const int g = lane / 4, t = lane % 4;
    out[0] += d[g][2 * t];
    out[1] += d[g][2 * t + 1];
    out[2] += d[g + 8][2 * t];
    out[3] += d[g + 8][2 * t + 1];
  }
}

}  // namespace

void combine_mma_bfloat16(void* const* inputs, void* const* outputs, int) {
  combine_mma<BFloat16, 16>(inputs, outputs);
}
void combine_mma_half(void* const* inputs, void* const* outputs, int) {
  combine_mma<Half, 16>(inputs, outputs);
}
void combine_mma_tf32(void* const* inputs, void* const* outputs, int) {
  combine_mma<float, 8>(inputs, outputs);
}
void check_tf32(const uint32_t* words, int count, const Site& site) {
  for (int i = 0; i < count; ++i)
    if ((words[i] & 0x1fffu) && !std::isnan(std::bit_cast<float>(words[i])))
      fatal("an operand that is not rounded to TF32 at " + where(site));
}

}  // namespace densenet_efficient::emulation
