// The state of the emulated machine, shared by its scheduler and its memory accesses.
#pragma once

#include <deque>
#include <memory>
#include <random>
#include <string>
#include <unordered_map>

#include "counting.h"
#include "fiber.h"
#include "shared_memory.h"

namespace densenet_efficient::emulation {

constexpr int kNone = -1;

// The accesses of one warp at one place since its last synchronisation.
struct SiteLog {
  uint32_t occurrences[kWarp] = {};
  std::vector<Request> requests;
};

struct SiteKey {
  const char* file;
  uint64_t place;
  bool operator==(const SiteKey&) const = default;
};
struct SiteHash {
  size_t operator()(const SiteKey& key) const {
    return (reinterpret_cast<size_t>(key.file) ^ key.place) * 0x9e3779b97f4a7c15ull >> 17;
  }
};
struct Warp {
  int arrived = 0;
  uint32_t interval = 1;  // counts sync_warp, which orders the warp's memory accesses
  WarpOp op = WarpOp::kSync;
  Site site;
  void* inputs[kWarp];
  void* outputs[kWarp];
  std::vector<SiteLog> logs;  // by site
  std::vector<int> touched;   // sites with requests in logs
};

struct Copy {
  void* shared;
  const void* global;
  int bytes, source_bytes;
  int group;
  Site site;  // where it was started
};

struct Thread {
  Context context;
  void* fake_stack = nullptr;
  ThreadPosition position;
  bool done = false;
  const char* waits_for = nullptr;
  Site waits_at;
  std::vector<Copy> copies;  // on their way, oldest first
  int open_group = 0;
};

struct Machine {
  DeviceFigures device;
  uint64_t seed = 0;
  bool listing = false;
  std::mt19937_64 random;
  std::vector<Counters> launches;

  // The launch and block under way.
  const std::function<void()>* body = nullptr;
  Counters* counters = nullptr;
  std::unordered_map<SiteKey, int, SiteHash> sites;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::deque<int> runnable;
  std::unique_ptr<Stacks> stacks;
  SharedMemory shared;
  uint32_t interval = 1;
  int at_barrier = 0, running = kNone, left = 0;
  Site barrier_site;
  std::string error;

  Context host;
  void* host_fake_stack = nullptr;
  const void* host_bottom = nullptr;
  size_t host_size = 0;
};
extern Machine machine;

// "file.cu:12".
std::string where(const Site& site);
SiteKey key_of(const Site& site, int kind);

// Ends the launch with this message and the running thread's place; for use on a fiber.
[[noreturn]] void fatal(const std::string& message);

// Counts what a warp, or a thread's copy under way, has left to count.
void flush(Warp& warp);
void complete(const Copy& copy);

}  // namespace densenet_efficient::emulation
