// Runs one kernel launch on the host: every thread of a block is a fiber, warp primitives and
// barriers are rendezvous, shared memory is an exactly sized heap block filled with NaN.
//
// What it checks: barriers that not all threads reach, warp primitives that not all lanes reach at
// the same place, two threads touching the same shared bytes without a barrier in between,
// misaligned vector accesses; out-of-bounds accesses are left to the address sanitizer. The order
// in which threads run follows a seed, so that a result that depends on it shows.
// What it counts: see Counters. Lanes of a warp that execute the same access between two
// synchronisations are one warp-wide access, as they would be on the device.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>
#include <string>
#include <vector>

namespace densenet_efficient::emulation {

using Site = std::source_location;

enum class Access { kGlobalLoad, kGlobalStore, kSharedLoad, kSharedStore };

// Of one place in the source: how often warps accessed memory there, and at what cost.
struct SiteCounters {
  std::string file;
  int line = 0;
  Access access = Access::kGlobalLoad;
  int64_t requests = 0;  // warp-wide
  int64_t bytes = 0;     // distinct bytes within each request
  int64_t units = 0;     // sectors of 32 bytes, or shared-memory wavefronts
  int64_t ideal = 0;     // what the same bytes cost at best
};

// Global traffic of one tensor in one direction, by the warps' requests.
struct TrafficCounters {
  int64_t bytes = 0;
  int64_t sectors = 0;   // of 32 bytes
  int64_t distinct = 0;  // sectors touched at all: what must come from or go to memory
  int64_t distinct_bytes = 0;
};

// Of one tensor, which the caller has named (name_range); all others are the workspace.
struct TensorCounters {
  std::string name;
  TrafficCounters load, store;
};

// What a launch is given: its arguments, laid out as the device finds them, and how its tiles are
// dealt out (cuda/launch.h).
struct Parameters {
  std::vector<unsigned char> bytes;
  int64_t tiles = 0, ranges = 0;

  template <typename Arg>
  void append(const Arg& arg) {
    const size_t begin = (bytes.size() + alignof(Arg) - 1) / alignof(Arg) * alignof(Arg);
    bytes.resize(begin + sizeof(Arg));
    std::memcpy(bytes.data() + begin, &arg, sizeof(Arg));
  }
};

// Of one kernel launch.
struct Counters {
  std::string op, kernel;
  Parameters parameters;
  int grid_x = 0, grid_y = 0, block = 0;
  int64_t shared_bytes = 0;
  int64_t mma = 0;        // warp-wide tensor-core instructions
  int64_t mma_flops = 0;  // their multiplications and additions
  int64_t ldmatrix = 0;   // warp-wide
  int64_t shuffles = 0;   // warp-wide
  int64_t barriers = 0;   // block-wide
  std::vector<SiteCounters> sites;
  std::vector<TensorCounters> tensors;
};

// What launchers size their grids and tiles by: a small Hopper device, unless told otherwise.
struct DeviceFigures {
  int multiprocessors = 4;
  int shared_bytes = 227 * 1024;  // the most one block may ask for
};
void set_device(const DeviceFigures& figures);
const DeviceFigures& device();

// The run's order: 0 runs threads in ascending order, 1 in descending, others shuffle. Even seeds
// let asynchronous copies arrive as late as they may, odd ones at once.
void set_seed(uint64_t seed);
const std::vector<Counters>& launches();
void clear_launches();

// Of all workspaces since these counters were last taken.
struct WorkspaceCounters {
  int64_t live = 0;    // bytes
  int64_t peak = 0;    // the most that were live at a time
  int64_t unused = 0;  // bytes that no kernel had stored to when their workspace was given back
};
WorkspaceCounters take_workspace_counters();

// A workspace, counted while this object lives.
class CountedWorkspace {
 public:
  CountedWorkspace() = default;
  CountedWorkspace(const void* begin, int64_t bytes);
  CountedWorkspace(const CountedWorkspace&) = delete;
  CountedWorkspace& operator=(const CountedWorkspace&) = delete;
  ~CountedWorkspace();

  // Ignores what lies elsewhere.
  void note_store(uintptr_t address, int bytes);

 private:
  uintptr_t begin_ = 0;
  std::vector<bool> stored_;  // by byte
};

// Whether launches are only listed, not run: for shapes too large to run.
void set_listing(bool listing);
bool listing();

// Accesses within these bytes are counted under this name; a null name forgets all ranges.
void name_range(const char* name, const void* begin, int64_t bytes);

// Runs body once for every thread of the grid. Throws std::runtime_error on a broken rule.
void run(const char* op, const char* kernel, int grid_x, int grid_y, int block,
         int64_t shared_bytes, const Parameters& parameters, const std::function<void()>& body);

// ---- Called from kernels, on a fiber ------------------------------------------------------------

struct ThreadPosition {
  int thread, block_x, block_y, grid_x, grid_y, lane, warp;
};
const ThreadPosition& position();
unsigned char* shared_block();

// Notes one thread's access, and fails it where the address is not a multiple of the width.
void note(Access access, const void* pointer, int bytes, const Site& site);

void block_barrier(const Site& site);

enum class WarpOp { kSync, kShuffle, kBallot, kLdmatrix, kTranspose, kMma };

// Waits until all 32 lanes are here; the last one runs combine over every lane's input and output.
using Combine = void (*)(void* const* inputs, void* const* outputs, int argument);
void warp_rendezvous(WarpOp op, const void* input, void* output, Combine combine, int argument,
                     int flops, const Site& site);

// ---- Combinations that tensor cores make (tensor_core.cpp) --------------------------------------

struct MmaOperands {
  const uint32_t* a;  // 4 registers
  const uint32_t* b;  // 2 registers
};

// Inputs: the address of a row; argument: the number of matrices, negative: transposed.
void combine_ldmatrix(void* const* inputs, void* const* outputs, int argument);
// Inputs: two 16-bit elements of an 8x8 matrix.
void combine_transpose(void* const* inputs, void* const* outputs, int argument);
// Inputs: MmaOperands.
void combine_mma_bfloat16(void* const* inputs, void* const* outputs, int argument);
void combine_mma_half(void* const* inputs, void* const* outputs, int argument);
void combine_mma_tf32(void* const* inputs, void* const* outputs, int argument);
// Fails where a word is no TF32 value: tensor cores would drop its lower bits, towards zero.
void check_tf32(const uint32_t* words, int count, const Site& site);

// ---- Asynchronous copies ------------------------------------------------------------------------

void async_copy(void* shared, const void* global, int bytes, int source_bytes, const Site& site);
void async_commit();
void async_wait(int pending);

}  // namespace densenet_efficient::emulation
