// What one warp-wide access costs: sectors of global memory, wavefronts of shared memory.
#pragma once

#include <cstdint>
#include <vector>

#include "emulator.h"

namespace densenet_efficient::emulation {

constexpr int kWarp = 32;

// One warp-wide access: the lanes that took part and their addresses.
struct Request {
  uint32_t lanes = 0;
  uintptr_t address[kWarp];
  uint8_t bytes[kWarp];
};

// Starts a launch's counters: its tensors are the ranges that were named, followed by the
// workspace.
void start_counting(std::vector<TensorCounters>& tensors);

// Distinct sectors of 32 bytes that a request touches.
void count_global(const Request& request, SiteCounters& site, std::vector<TensorCounters>& tensors);

// Wavefronts of 32 banks x 4 bytes: lanes go together 32, 16 or 8 at a time (accesses of up to 4, 8
// or 16 bytes); within such a phase distinct words of one bank follow each other.
void count_shared(const Request& request, uintptr_t base, SiteCounters& site);

}  // namespace densenet_efficient::emulation
