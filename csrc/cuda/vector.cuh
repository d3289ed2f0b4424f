// Values of a storage type T by V at a time: one access of up to 16 bytes, arithmetic in float
// (double for double).
#pragma once

#include <cstring>

#include "device.cuh"

namespace densenet_efficient {

template <typename T>
struct Arithmetic_ {
  using type = float;
};
template <>
struct Arithmetic_<double> {
  using type = double;
};
template <typename T>
using Arithmetic = typename Arithmetic_<T>::type;

template <int Bytes>
struct Raw;
template <>
struct Raw<1> {
  using type = uint8_t;
};
template <>
struct Raw<2> {
  using type = uint16_t;
};
template <>
struct Raw<4> {
  using type = uint32_t;
};
template <>
struct Raw<8> {
  using type = uint2;
};
template <>
struct Raw<16> {
  using type = uint4;
};

// V values as they lie in memory. A default-initialised vector holds nothing of use.
template <typename T, int V>
struct Vector {
  using Bits = typename Raw<V * sizeof(T)>::type;
  Bits bits;

  // All of them zero.
  __device__ __forceinline__ static Vector zero() {
    Vector vector;
    memset(&vector.bits, 0, sizeof(Bits));
    return vector;
  }
};

template <typename T, int V>
__device__ __forceinline__ Vector<T, V> load_vector(const T* pointer DE_HERE) {
  return {device::global_load<typename Vector<T, V>::Bits>(pointer DE_AT)};
}

// For tensors that the kernel does not write: such loads may be moved ahead of stores.
template <typename T, int V>
__device__ __forceinline__ Vector<T, V> load_input(const T* pointer DE_HERE) {
  return {device::global_load_constant<typename Vector<T, V>::Bits>(pointer DE_AT)};
}

template <typename T, int V>
__device__ __forceinline__ void store_vector(T* pointer, const Vector<T, V>& vector DE_HERE) {
  device::global_store(pointer, vector.bits DE_AT);
}

template <typename T, int V>
__device__ __forceinline__ void unpack(const Vector<T, V>& vector, Arithmetic<T> (&values)[V]) {
  if constexpr (sizeof(T) == 2) {
    uint32_t words[(V + 1) / 2] = {};
    memcpy(words, &vector.bits, sizeof(vector.bits));
#pragma unroll
    for (int i = 0; i < (V + 1) / 2; ++i) {
      const float2 pair = device::unpack<T>(words[i]);
      values[2 * i] = pair.x;
      if constexpr (V > 1) values[2 * i + 1] = pair.y;
    }
  } else {
    memcpy(values, &vector.bits, sizeof(vector.bits));
  }
}

// Rounds to nearest even.
template <typename T, int V>
__device__ __forceinline__ Vector<T, V> pack(const Arithmetic<T> (&values)[V]) {
  Vector<T, V> vector;
  if constexpr (sizeof(T) == 2) {
    uint32_t words[(V + 1) / 2];
#pragma unroll
    for (int i = 0; i < (V + 1) / 2; ++i)
      words[i] = device::pack<T>(values[2 * i], V > 1 ? values[(2 * i + 1) % V] : 0.0f);
    memcpy(&vector.bits, words, sizeof(vector.bits));
  } else {
    memcpy(&vector.bits, values, sizeof(vector.bits));
  }
  return vector;
}

// V values of a per-channel table, which may begin anywhere.
template <typename A, int V>
__device__ __forceinline__ void load_values(const A* pointer, A (&values)[V] DE_HERE) {
  constexpr int kWide = 16 / sizeof(A);
  if constexpr (V % kWide == 0) {
    if (reinterpret_cast<uintptr_t>(pointer) % 16 == 0) {
#pragma unroll
      for (int v = 0; v < V; v += kWide) {
        const uint4 bits = device::global_load_constant<uint4>(pointer + v DE_AT);
        memcpy(values + v, &bits, 16);
      }
      return;
    }
  }
#pragma unroll
  for (int v = 0; v < V; ++v) values[v] = device::global_load_constant<A>(pointer + v DE_AT);
}

}  // namespace densenet_efficient
