// The few hardware primitives that kernels may use, and nothing else: a kernel that touches the
// machine only through this file also runs on the host, where csrc/emulation executes, checks and
// counts it.
//
// How to write a kernel
//   #include "device.cuh"                    // primitives, in namespace densenet_efficient::device
//   #include "launch.h"                      // launchers: launch<>(), guards, dtype dispatch
//   template <typename T>
//   __global__ void __launch_bounds__(256) stage_kernel(StageArgs args) {
//     using namespace device; ... }
//
// Rules, each of which the emulation enforces or needs
//   - Blocks are one-dimensional (thread_index), a multiple of 32 threads. Grids are up to (x, y).
//   - Every access to global memory is a global_load / global_store / cp_async, every access to
//     shared memory a shared_load / shared_store / ldmatrix / cp_async; the value type sets the
//     width: uint16_t, uint32_t, uint2, uint4, float, double, ... Addresses must be aligned to it.
//     A plain dereference works but is neither counted nor checked for races.
//   - Shared memory is one dynamic block, shared_memory(), exactly as large as launch<>() says.
//   - sync_threads, and the warp primitives (shuffles, ballot, sync_warp, ldmatrix, mma), must be
//     reached by all threads (all 32 lanes) at the same place in the source.
//   - cp_async with source_bytes < N writes zeros after the source bytes; the source is not read
//     where source_bytes is 0. Data is there after cp_async_wait<n>() and a barrier.
//   - A helper that wraps an access passes its caller's place on to the emulation's counters:
//     template <typename T>
//     __device__ T helper(const T* p DE_HERE) { return global_load<T>(p DE_AT); }
//   - No atomics: the second kernel of a reduction combines what blocks leave (reduce/finish.cuh).
#pragma once

#include <cstdint>

#include "../norm_relu.h"

#if defined(DE_EMULATE)
#include "../emulation/device_host.h"
#else

#define DE_HERE
#define DE_AT

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

namespace densenet_efficient::device {

using BFloat16 = torch::headeronly::BFloat16;
using Half = torch::headeronly::Half;

// ---- Indices ------------------------------------------------------------------------------------

__device__ __forceinline__ int thread_index() { return static_cast<int>(threadIdx.x); }
__device__ __forceinline__ int lane_index() { return static_cast<int>(threadIdx.x) & 31; }
// Read from lane 0, so that the compiler knows that it is the same for the whole warp.
__device__ __forceinline__ int warp_index() {
  return __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) >> 5, 0);
}
__device__ __forceinline__ int block_x() { return static_cast<int>(blockIdx.x); }
__device__ __forceinline__ int block_y() { return static_cast<int>(blockIdx.y); }
__device__ __forceinline__ int grid_x() { return static_cast<int>(gridDim.x); }
__device__ __forceinline__ int grid_y() { return static_cast<int>(gridDim.y); }

// ---- Barriers and warp exchange -----------------------------------------------------------------

__device__ __forceinline__ void sync_threads() { __syncthreads(); }
__device__ __forceinline__ void sync_warp() { __syncwarp(); }

template <typename V>
__device__ __forceinline__ V shuffle_xor(V value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
template <typename V>
__device__ __forceinline__ V shuffle(V value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}
// The value itself, from the lane's own hand: the compiler, which would compute it anew at every
// use to spare a register, keeps what a shuffle gave.
__device__ __forceinline__ int kept(int value) { return shuffle(value, lane_index()); }
__device__ __forceinline__ uint32_t ballot(bool predicate) {
  return __ballot_sync(0xffffffffu, predicate);
}

// The upper halves of two words, or the lower ones, side by side: the first one's is the lower.
__device__ __forceinline__ uint32_t same_half(uint32_t first, uint32_t second, bool upper) {
  return __byte_perm(first, second, upper ? 0x7632 : 0x5410);
}

// Bits that are set.
__device__ __forceinline__ int population(uint32_t bits) { return __popc(bits); }

// ---- Memory -------------------------------------------------------------------------------------

__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char dynamic_shared_memory[];
  return dynamic_shared_memory;
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// pointer + count * pitch bytes, in one instruction: the compiler takes four where it does not see
// that both factors have 32 bits.
template <typename P>
__device__ __forceinline__ P* advance(P* pointer, int count, int pitch) {
  P* result;
  asm("mad.wide.s32 %0, %1, %2, %3;" : "=l"(result) : "r"(count), "r"(pitch), "l"(pointer));
  return result;
}

template <typename V>
__device__ __forceinline__ V global_load(const void* pointer) {
  return *static_cast<const V*>(pointer);
}
// For data that no kernel writes while this one runs: the read-only path.
template <typename V>
__device__ __forceinline__ V global_load_constant(const void* pointer) {
  return __ldg(static_cast<const V*>(pointer));
}
template <typename V>
__device__ __forceinline__ void global_store(void* pointer, V value) {
  *static_cast<V*>(pointer) = value;
}
template <typename V>
__device__ __forceinline__ V shared_load(const void* pointer) {
  return *static_cast<const V*>(pointer);
}
template <typename V>
__device__ __forceinline__ void shared_store(void* pointer, V value) {
  *static_cast<V*>(pointer) = value;
}

// Copies N (4, 8 or 16) bytes from global to shared memory without waiting.
template <int N>
__device__ __forceinline__ void cp_async(void* shared, const void* global, int source_bytes = N) {
  static_assert(N == 4 || N == 8 || N == 16);
  if constexpr (N == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
                 "l"(global), "r"(source_bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)),
                 "l"(global), "n"(N), "r"(source_bytes)
                 : "memory");
  }
}
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until at most `Pending` of this thread's newest groups are still under way.
template <int Pending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// ---- Tensor cores -------------------------------------------------------------------------------

// Loads 8x8 matrices of 16-bit elements; `row` is the shared address of the 16-byte row that this
// lane names: lanes 8i..8i+7 name the rows of matrix i. Afterwards r[i] holds
// row lane/4, columns 2*(lane%4) and +1 of matrix i; _trans: of its transpose.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
// An 8x8 matrix of 16-bit elements that lies in registers as ldmatrix leaves it, transposed.
__device__ __forceinline__ uint32_t transpose_8x8(uint32_t word) {
  uint32_t result;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(word));
  return result;
}
// d [16, 8] += a [16, 16] @ b [16, 8], fp32 accumulation. With g = lane / 4 and t = lane % 4:
//   a[0] = A(g, 2t..2t+1)   a[1] = A(g+8, 2t..)   a[2] = A(g, 2t+8..)   a[3] = A(g+8, 2t+8..)
//   b[0] = B(2t..2t+1, g)   b[1] = B(2t+8.., g)
//   d[0], d[1] = D(g, 2t), D(g, 2t+1)   d[2], d[3] = D(g+8, 2t), D(g+8, 2t+1)
template <typename T>
__device__ __forceinline__ void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4],
                                            const uint32_t (&b)[2]);
template <>
__device__ __forceinline__ void mma_16x8x16<BFloat16>(float (&d)[4], const uint32_t (&a)[4],
                                                      const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ __forceinline__ void mma_16x8x16<Half>(float (&d)[4], const uint32_t (&a)[4],
                                                  const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// d [16, 8] += a [16, 8] @ b [8, 8] in TF32; a and b hold floats (see to_tf32), with
//   a[0] = A(g, t)   a[1] = A(g+8, t)   a[2] = A(g, t+4)   a[3] = A(g+8, t+4)
//   b[0] = B(t, g)   b[1] = B(t+4, g)
__device__ __forceinline__ void mma_16x8x8_tf32(float (&d)[4], const uint32_t (&a)[4],
                                                const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ uint32_t to_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}

// ---- Conversions --------------------------------------------------------------------------------

// Two 16-bit values in one register: the first in the low half. Rounds to nearest even.
template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack<BFloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
template <>
__device__ __forceinline__ uint32_t pack<Half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// pack of both values after a ReLU, in one instruction; a NaN stays one, as in relu().
template <typename T>
__device__ __forceinline__ uint32_t pack_relu(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack_relu<BFloat16>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
template <>
__device__ __forceinline__ uint32_t pack_relu<Half>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

template <typename T>
__device__ __forceinline__ float2 unpack(uint32_t pair);
template <>
__device__ __forceinline__ float2 unpack<BFloat16>(uint32_t pair) {
  return float2{__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}
template <>
__device__ __forceinline__ float2 unpack<Half>(uint32_t pair) {
  return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}

__device__ __forceinline__ float to_float_bits(uint32_t bits) { return __uint_as_float(bits); }
__device__ __forceinline__ uint32_t to_bits(float value) { return __float_as_uint(value); }

}  // namespace densenet_efficient::device
#endif  // DE_EMULATE
