// The host's side of cuda/device.cuh: the same primitives, executed and counted by the emulator.
// Each takes the place in the source that calls it as a last argument, filled in by the compiler.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "emulator.h"

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

#define DE_HERE , ::std::source_location site = ::std::source_location::current()
#define DE_AT , site

namespace densenet_efficient {

using std::max;
using std::min;

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

}  // namespace densenet_efficient

namespace densenet_efficient::device {

using BFloat16 = torch::headeronly::BFloat16;
using Half = torch::headeronly::Half;
using emulation::Access;
using emulation::Site;
using emulation::WarpOp;

// ---- Indices ------------------------------------------------------------------------------------

inline int thread_index() { return emulation::position().thread; }
inline int lane_index() { return emulation::position().lane; }
inline int warp_index() { return emulation::position().warp; }
inline int block_x() { return emulation::position().block_x; }
inline int block_y() { return emulation::position().block_y; }
inline int grid_x() { return emulation::position().grid_x; }
inline int grid_y() { return emulation::position().grid_y; }

// ---- Barriers and warp exchange -----------------------------------------------------------------

inline void sync_threads(Site site = Site::current()) { emulation::block_barrier(site); }
inline void sync_warp(Site site = Site::current()) {
  emulation::warp_rendezvous(WarpOp::kSync, nullptr, nullptr, nullptr, 0, 0, site);
}

template <typename V>
struct Shuffle {
  V value;
  int source;  // the lane to read from; the lane's own where the exchange leaves the warp

  static void combine(void* const* inputs, void* const* outputs, int) {
    for (int lane = 0; lane < 32; ++lane) {
      const int source = static_cast<const Shuffle*>(inputs[lane])->source;
      *static_cast<V*>(outputs[lane]) = static_cast<const Shuffle*>(inputs[source])->value;
    }
  }
  V exchange(const Site& site) const {
    V result;
    emulation::warp_rendezvous(WarpOp::kShuffle, this, &result, &combine, 0, 0, site);
    return result;
  }
};

template <typename V>
V shuffle_xor(V value, int mask, Site site = Site::current()) {
  return Shuffle<V>{value, (lane_index() ^ mask) & 31}.exchange(site);
}
template <typename V>
V shuffle(V value, int lane, Site site = Site::current()) {
  return Shuffle<V>{value, lane & 31}.exchange(site);
}

template <typename P>
P* advance(P* pointer, int count, int pitch) {
  return reinterpret_cast<P*>(reinterpret_cast<intptr_t>(pointer) + int64_t(count) * pitch);
}

inline int kept(int value) { return value; }

inline uint32_t same_half(uint32_t first, uint32_t second, bool upper) {
  const int shift = upper ? 16 : 0;
  return (first >> shift & 0xffffu) | (second >> shift) << 16;
}

inline int population(uint32_t bits) { return std::popcount(bits); }

inline uint32_t ballot(bool predicate, Site site = Site::current()) {
  uint32_t result = 0;
  emulation::warp_rendezvous(
      WarpOp::kBallot, &predicate, &result,
      [](void* const* inputs, void* const* outputs, int) {
        uint32_t mask = 0;
        for (int lane = 0; lane < 32; ++lane)
          mask |= uint32_t(*static_cast<const bool*>(inputs[lane])) << lane;
        for (int lane = 0; lane < 32; ++lane) *static_cast<uint32_t*>(outputs[lane]) = mask;
      },
      0, 0, site);
  return result;
}

// ---- Memory -------------------------------------------------------------------------------------

inline unsigned char* shared_memory() { return emulation::shared_block(); }

template <typename V>
V global_load(const void* pointer, Site site = Site::current()) {
  emulation::note(Access::kGlobalLoad, pointer, sizeof(V), site);
  return *static_cast<const V*>(pointer);
}
template <typename V>
V global_load_constant(const void* pointer, Site site = Site::current()) {
  return global_load<V>(pointer, site);
}
template <typename V>
void global_store(void* pointer, V value, Site site = Site::current()) {
  emulation::note(Access::kGlobalStore, pointer, sizeof(V), site);
  *static_cast<V*>(pointer) = value;
}
template <typename V>
V shared_load(const void* pointer, Site site = Site::current()) {
  emulation::note(Access::kSharedLoad, pointer, sizeof(V), site);
  return *static_cast<const V*>(pointer);
}
template <typename V>
void shared_store(void* pointer, V value, Site site = Site::current()) {
  emulation::note(Access::kSharedStore, pointer, sizeof(V), site);
  *static_cast<V*>(pointer) = value;
}

template <int N>
void cp_async(void* shared, const void* global, int source_bytes = N, Site site = Site::current()) {
  static_assert(N == 4 || N == 8 || N == 16);
  emulation::async_copy(shared, global, N, source_bytes, site);
}
inline void cp_async_commit() { emulation::async_commit(); }
template <int Pending>
void cp_async_wait() {
  emulation::async_wait(Pending);
}

// ---- Tensor cores -------------------------------------------------------------------------------

inline void ldmatrix(uint32_t* r, const void* row, int argument, const Site& site) {
  const int named = 8 * std::abs(argument);
  if (lane_index() < named) emulation::note(Access::kSharedLoad, row, 16, site);
  emulation::warp_rendezvous(WarpOp::kLdmatrix, &row, r, &emulation::combine_ldmatrix, argument, 0,
                             site);
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, Site site = Site::current()) {
  ldmatrix(r, row, 4, site);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, Site site = Site::current()) {
  ldmatrix(r, row, -4, site);
}
inline uint32_t transpose_8x8(uint32_t word, Site site = Site::current()) {
  uint32_t result = 0;
  emulation::warp_rendezvous(WarpOp::kTranspose, &word, &result, &emulation::combine_transpose, 0,
                             0, site);
  return result;
}
inline float to_float_bits(uint32_t bits) { return std::bit_cast<float>(bits); }
inline uint32_t to_bits(float value) { return std::bit_cast<uint32_t>(value); }

template <typename T>
uint32_t pack(float low, float high) {
  return T(low).x | uint32_t(T(high).x) << 16;
}
template <typename T>
uint32_t pack_relu(float low, float high) {
  return pack<T>(relu(low), relu(high));
}
template <typename T>
float2 unpack(uint32_t pair) {
  return float2{static_cast<float>(T(static_cast<uint16_t>(pair), T::from_bits())),
                static_cast<float>(T(static_cast<uint16_t>(pair >> 16), T::from_bits()))};
}

template <typename T>
void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                 Site site = Site::current()) {
  const emulation::MmaOperands operands{a, b};
  constexpr auto combine =
      std::is_same_v<T, BFloat16> ? &emulation::combine_mma_bfloat16 : &emulation::combine_mma_half;
  emulation::warp_rendezvous(WarpOp::kMma, &operands, d, combine, 0, 2 * 16 * 8 * 16, site);
}
inline void mma_16x8x8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                            Site site = Site::current()) {
  emulation::check_tf32(a, 4, site);
  emulation::check_tf32(b, 2, site);
  const emulation::MmaOperands operands{a, b};
  emulation::warp_rendezvous(WarpOp::kMma, &operands, d, &emulation::combine_mma_tf32, 0,
                             2 * 16 * 8 * 8, site);
}
// Rounds to ten bits of fraction, ties away from zero.
inline uint32_t to_tf32(float value) {
  const uint32_t bits = to_bits(value);
  return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000u) & 0xffffe000u;
}

}  // namespace densenet_efficient::device
