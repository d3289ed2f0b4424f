// Running tasks on torch's threads, and the scratch they work in.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>

#include "../stable.h"
#include "tiling.h"

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

namespace densenet_efficient::cpu {

using tiling::Bands;
using tiling::Groups;
using tiling::RowTiles;

inline int64_t threads() { return torch::stable::get_num_threads(); }

// What parallel_for promises: all before it is seen by the tasks, and they by all after it. torch's
// threads meet in an OpenMP runtime that is not instrumented, so the thread sanitizer must be told,
// by addresses at which one thread tells and another hears. What tasks do to each other it sees for
// itself.
#if defined(__SANITIZE_THREAD__)
inline void tell(const void* at) { __tsan_release(const_cast<void*>(at)); }
inline void hear(const void* at) { __tsan_acquire(const_cast<void*>(at)); }
#else
inline void tell(const void*) {}
inline void hear(const void*) {}
#endif

template <typename F>
struct Tasks {
  const F& f;
  int64_t done = 0;  // its address is where tasks tell that they are

  // Hears at its own address, which is known without reading what another thread has written.
  void operator()(int64_t begin, int64_t end) const {
    hear(this);
    for (int64_t task = begin; task < end; ++task) f(task);
    tell(&done);
  }
};

// Calls f(task) for every task < tasks.
template <typename F>
void parallel(int64_t tasks, const F& f) {
  if (tasks <= 0) return;
  if (tasks == 1) return f(int64_t(0));
  const Tasks<F> all{f};
  tell(&all);
  torch::stable::parallel_for(0, tasks, 1, all);
  hear(&all.done);
}

// Which of `slots` tile scratches is the running thread's own. A call from inside somebody else's
// parallel region runs on one thread, whatever its index: then there is one slot.
inline int64_t own_slot(int64_t slots) {
  uint32_t index = 0;
  torch_get_thread_idx(&index);
  return index % slots;
}

// Scratch of one call, allocated through torch and freed with it. take() hands it out piece by
// piece, each on a boundary of 64 bytes.
class Workspace {
 public:
  Workspace(const Tensor& like, int64_t bytes)
      : tensor_(
            torch::stable::new_empty(like, {tiling::allocation_bytes(bytes)}, ScalarType::Byte)) {
    at_ = reinterpret_cast<char*>(tensor_.mutable_data_ptr());
    at_ += (64 - reinterpret_cast<uintptr_t>(at_) % 64) % 64;
    end_ = at_ + round_up(bytes, 64);
  }

  template <typename A>
  A* take(int64_t count) {
    A* piece = reinterpret_cast<A*>(at_);
    at_ += round_up(count * static_cast<int64_t>(sizeof(A)), 64);
    if (at_ > end_) throw std::logic_error("densenet_efficient: cpu/tiling.h counts too little");
    return piece;
  }

  template <typename A>
  A* take_zeros(int64_t count) {
    A* piece = take<A>(count);
    std::fill_n(piece, count, A(0));
    return piece;
  }

 private:
  Tensor tensor_;
  char* at_;
  char* end_;
};

}  // namespace densenet_efficient::cpu
