// A block's shared memory: an exactly sized heap block filled with NaN, and who touched which byte.
// Two threads that touch the same byte between two barriers race if one of them writes; sync_warp
// orders the accesses of one warp. So a missing barrier is found whatever the order of threads.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace densenet_efficient::emulation {

// A thread and when it acts: intervals between barriers of the block, and of its warp.
struct Toucher {
  int thread;
  uint32_t interval, warp_interval;
};

class SharedMemory {
 public:
  SharedMemory() = default;
  ~SharedMemory() { release(); }
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  void allocate(int64_t bytes);
  void release();
  void start_block();  // NaN everywhere, untouched
  unsigned char* data() const { return data_; }

  // What is wrong with this access; empty if nothing is.
  std::string touch(bool write, const void* pointer, int bytes, const Toucher& self);

  // An asynchronous copy to these bytes is under way: no thread may touch them.
  void set_pending(const void* pointer, int bytes, bool pending);

 private:
  struct Byte {
    uint32_t write_interval = 0, write_warp_interval = 0;
    uint32_t read_interval = 0, read_warp_interval = 0;
    int16_t writer = -1, reader = -1;
    bool read_by_warps = false, read_by_lanes = false;  // by several
    bool pending = false;
  };

  unsigned char* data_ = nullptr;
  int64_t size_ = 0;
  std::vector<Byte> bytes_;
};

}  // namespace densenet_efficient::emulation
