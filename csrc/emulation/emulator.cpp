// The emulator's scheduler, checks and counters; see emulator.h.
#include "emulator.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <numeric>
#include <random>
#include <sstream>
#include <stdexcept>
#include <unordered_map>

#include "counting.h"
#include "fiber.h"
#include "shared_memory.h"

namespace densenet_efficient::emulation {
namespace {

constexpr int kNobody = -1;

std::string where(const Site& site) {
  const std::string file = site.file_name();
  return file.substr(file.find_last_of('/') + 1) + ":" + std::to_string(site.line());
}

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
SiteKey key_of(const Site& site, int kind) {
  return {site.file_name(), uint64_t(site.line()) << 24 | uint64_t(site.column()) << 4 | kind};
}

// ---- Threads and warps --------------------------------------------------------------------------

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
  uint64_t seed = 0;
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
  int at_barrier = 0, running = kNobody, left = 0;
  Site barrier_site;
  std::string error;

  Context host;
  void* host_fake_stack = nullptr;
  const void* host_bottom = nullptr;
  size_t host_size = 0;
};
Machine machine;

// ---- Switching ----------------------------------------------------------------------------------

void arrived_from(void* fake_stack) {
#if defined(DE_SANITIZE)
  const void* bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(fake_stack, &bottom, &size);
  if (!machine.host_bottom) {
    machine.host_bottom = bottom;
    machine.host_size = size;
  }
#else
  (void)fake_stack;
#endif
}

// Leaves the running context for a thread's fiber, or for the host (kNobody).
void switch_to(int target, bool for_good = false) {
  Machine& m = machine;
  Context& from = m.running == kNobody ? m.host : m.threads[m.running].context;
  Context& to = target == kNobody ? m.host : m.threads[target].context;
  void** fake = m.running == kNobody ? &m.host_fake_stack : &m.threads[m.running].fake_stack;
  m.running = target;
#if defined(DE_SANITIZE)
  __sanitizer_start_switch_fiber(for_good ? nullptr : fake,
                                 target == kNobody ? m.host_bottom : m.stacks->stack(target),
                                 target == kNobody ? m.host_size : Stacks::size());
#else
  (void)for_good;
#endif
  switch_context(from, to);
  arrived_from(*fake);
}

[[noreturn]] void fatal(const std::string& message) {
  const ThreadPosition& at = position();
  std::ostringstream text;
  text << message << " (thread " << at.thread << " of block " << at.block_x << ", " << at.block_y
       << ")";
  machine.error = text.str();
  switch_to(kNobody, true);
  std::abort();
}

int next_thread() {
  Machine& m = machine;
  if (m.runnable.empty()) return kNobody;
  if (m.seed > 1) std::swap(m.runnable[m.random() % m.runnable.size()], m.runnable.back());
  int next;
  if (m.seed == 0) {
    next = m.runnable.front();
    m.runnable.pop_front();
  } else {
    next = m.runnable.back();
    m.runnable.pop_back();
  }
  return next;
}

void wait(const char* what, const Site& site) {
  Thread& self = machine.threads[machine.running];
  self.waits_for = what;
  self.waits_at = site;
  switch_to(next_thread());
  self.waits_for = nullptr;
}

// Lets the last to arrive go on first, or, when the order is shuffled, anyone.
void release(int first, int last) {
  Machine& m = machine;
  const int self = m.running;
  for (int t = first; t < last; ++t)
    if (t != self && !m.threads[t].done) m.runnable.push_back(t);
  if (m.seed > 1) {
    m.runnable.push_back(self);
    const int next = next_thread();
    if (next != self) switch_to(next);
  }
}

void complete(const Copy& copy);

void thread_entry() {
  Machine& m = machine;
  arrived_from(nullptr);
  (*m.body)();
  Thread& self = m.threads[m.running];
  for (const Copy& copy : self.copies) complete(copy);
  self.copies.clear();
  self.done = true;
  --m.left;
  switch_to(next_thread(), true);
  std::abort();
}

// ---- Flushing the log ---------------------------------------------------------------------------

void flush(Warp& warp) {
  Machine& m = machine;
  for (const int index : warp.touched) {
    SiteLog& log = warp.logs[index];
    SiteCounters& site = m.counters->sites[index];
    for (const Request& request : log.requests) {
      if (site.access == Access::kGlobalLoad || site.access == Access::kGlobalStore)
        count_global(request, site, m.counters->tensors);
      else
        count_shared(request, reinterpret_cast<uintptr_t>(m.shared.data()), site);
    }
    log.requests.clear();
    std::fill(log.occurrences, log.occurrences + kWarp, 0);
  }
  warp.touched.clear();
}

// ---- Accesses -----------------------------------------------------------------------------------

void check_shared(bool write, const void* pointer, int bytes, const Site& site) {
  Machine& m = machine;
  const ThreadPosition& at = m.threads[m.running].position;
  const std::string wrong =
      m.shared.touch(write, pointer, bytes, {at.thread, m.interval, m.warps[at.warp].interval});
  if (!wrong.empty()) fatal(wrong + ", at " + where(site));
}

void complete(const Copy& copy) {
  std::memcpy(copy.shared, copy.global, copy.source_bytes);
  std::memset(static_cast<char*>(copy.shared) + copy.source_bytes, 0,
              copy.bytes - copy.source_bytes);
  machine.shared.set_pending(copy.shared, copy.bytes, false);
  check_shared(true, copy.shared, copy.bytes, copy.site);
}

void log_access(Access access, const void* pointer, int bytes, const Site& site) {
  Machine& m = machine;
  const SiteKey key = key_of(site, static_cast<int>(access));
  auto [entry, is_new] = m.sites.try_emplace(key, static_cast<int>(m.counters->sites.size()));
  if (is_new) {
    SiteCounters counters;
    const std::string file = site.file_name();
    counters.file = file.substr(file.find_last_of('/') + 1);
    counters.line = static_cast<int>(site.line());
    counters.access = access;
    m.counters->sites.push_back(counters);
  }
  const ThreadPosition& at = m.threads[m.running].position;
  Warp& warp = m.warps[at.warp];
  if (static_cast<int>(warp.logs.size()) <= entry->second) warp.logs.resize(entry->second + 1);
  SiteLog& log = warp.logs[entry->second];
  if (log.requests.empty()) warp.touched.push_back(entry->second);
  const uint32_t occurrence = log.occurrences[at.lane]++;
  if (log.requests.size() <= occurrence) log.requests.resize(occurrence + 1);
  Request& request = log.requests[occurrence];
  request.lanes |= 1u << at.lane;
  request.address[at.lane] = reinterpret_cast<uintptr_t>(pointer);
  request.bytes[at.lane] = static_cast<uint8_t>(bytes);
}

void check_aligned(const void* pointer, int bytes, const Site& site) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0)
    fatal("misaligned access of " + std::to_string(bytes) + " bytes at " + where(site));
}

// ---- Running a block ----------------------------------------------------------------------------

std::string describe_deadlock() {
  std::ostringstream text;
  text << "not all threads reached a barrier:";
  std::vector<std::pair<std::string, int>> groups;
  for (const Thread& thread : machine.threads) {
    const std::string state =
        thread.done ? "ended"
                    : std::string("wait for ") + thread.waits_for + " at " + where(thread.waits_at);
    auto group =
        std::find_if(groups.begin(), groups.end(), [&](const auto& g) { return g.first == state; });
    if (group == groups.end())
      groups.emplace_back(state, 1);
    else
      ++group->second;
  }
  for (const auto& [state, count] : groups) text << " " << count << " threads " << state << ";";
  return text.str();
}

void run_block(int block_x, int block_y) {
  Machine& m = machine;
  const Counters& launch = *m.counters;
  m.shared.start_block();
  m.interval = 1;
  m.at_barrier = 0;
  m.left = launch.block;
  m.runnable.clear();
  for (Warp& warp : m.warps) {
    warp.arrived = 0;
    warp.interval = 1;
  }
  for (int t = 0; t < launch.block; ++t) {
    Thread& thread = m.threads[t];
    thread.position = {t, block_x, block_y, launch.grid_x, launch.grid_y, t % kWarp, t / kWarp};
    thread.done = false;
    thread.waits_for = nullptr;
    thread.copies.clear();
    thread.open_group = 0;
    prepare(thread.context, m.stacks->stack(t), Stacks::size(), &thread_entry);
    m.runnable.push_back(t);
  }
  switch_to(next_thread());
  if (m.error.empty() && m.left > 0) m.error = describe_deadlock();
  if (m.error.empty())
    for (Warp& warp : m.warps) flush(warp);
}

}  // namespace

// ---- Interface ----------------------------------------------------------------------------------

void set_seed(uint64_t seed) { machine.seed = seed; }
const std::vector<Counters>& launches() { return machine.launches; }
void clear_launches() { machine.launches.clear(); }

const ThreadPosition& position() { return machine.threads[machine.running].position; }
unsigned char* shared_block() { return machine.shared.data(); }

void run(const char* op, const char* kernel, int grid_x, int grid_y, int block,
         int64_t shared_bytes, const std::function<void()>& body) {
  Machine& m = machine;
  if (grid_x < 1 || grid_y < 1 || grid_y > 65535 || block < 1 || block > 1024 || block % kWarp ||
      shared_bytes < 0 || shared_bytes > 227 * 1024)
    throw std::runtime_error("emulation: impossible launch of " + std::string(kernel));
  if (!m.stacks || m.stacks->count() < block) m.stacks = std::make_unique<Stacks>(block);
  m.random.seed(m.seed);
  m.launches.emplace_back();
  m.counters = &m.launches.back();
  m.counters->op = op;
  m.counters->kernel = kernel;
  m.counters->grid_x = grid_x;
  m.counters->grid_y = grid_y;
  m.counters->block = block;
  m.counters->shared_bytes = shared_bytes;
  start_counting(m.counters->tensors);
  m.sites.clear();
  m.body = &body;
  m.error.clear();
  m.threads.assign(block, Thread{});
  m.warps.assign(block / kWarp, Warp{});
  m.shared.allocate(shared_bytes);

  std::vector<int64_t> blocks(int64_t(grid_x) * grid_y);
  std::iota(blocks.begin(), blocks.end(), 0);
  if (m.seed == 1) std::reverse(blocks.begin(), blocks.end());
  if (m.seed > 1) std::shuffle(blocks.begin(), blocks.end(), m.random);
  for (const int64_t b : blocks) {
    run_block(static_cast<int>(b % grid_x), static_cast<int>(b / grid_x));
    if (!m.error.empty()) break;
  }
  m.shared.release();
  if (m.error.empty()) return;
  m.stacks->forget();
  throw std::runtime_error("emulation of " + std::string(op) + ": " + m.error);
}

void note(Access access, const void* pointer, int bytes, const Site& site) {
  check_aligned(pointer, bytes, site);
  if (access == Access::kSharedLoad || access == Access::kSharedStore)
    check_shared(access == Access::kSharedStore, pointer, bytes, site);
  log_access(access, pointer, bytes, site);
}

void block_barrier(const Site& site) {
  Machine& m = machine;
  if (m.at_barrier == 0) m.barrier_site = site;
  if (!(key_of(site, 0) == key_of(m.barrier_site, 0)))
    fatal("divergent barrier: some threads wait at " + where(m.barrier_site) + ", others at " +
          where(site));
  if (++m.at_barrier < m.counters->block) return wait("a barrier", site);
  m.at_barrier = 0;
  ++m.interval;
  ++m.counters->barriers;
  for (Warp& warp : m.warps) flush(warp);
  release(0, m.counters->block);
}

void warp_rendezvous(WarpOp op, const void* input, void* output, Combine combine, int argument,
                     int flops, const Site& site) {
  Machine& m = machine;
  const ThreadPosition& at = m.threads[m.running].position;
  Warp& warp = m.warps[at.warp];
  if (warp.arrived == 0) {
    warp.op = op;
    warp.site = site;
  }
  if (op != warp.op || !(key_of(site, 0) == key_of(warp.site, 0)))
    fatal("divergent warp primitive: some lanes are at " + where(warp.site) + ", others at " +
          where(site));
  warp.inputs[at.lane] = const_cast<void*>(input);
  warp.outputs[at.lane] = output;
  if (++warp.arrived < kWarp) return wait("a warp primitive", site);
  warp.arrived = 0;
  flush(warp);
  if (combine) combine(warp.inputs, warp.outputs, argument);
  if (op == WarpOp::kSync) ++warp.interval;
  if (op == WarpOp::kShuffle) ++m.counters->shuffles;
  if (op == WarpOp::kLdmatrix) ++m.counters->ldmatrix;
  if (op == WarpOp::kMma) {
    ++m.counters->mma;
    m.counters->mma_flops += flops;
  }
  release(at.warp * kWarp, (at.warp + 1) * kWarp);
}

void async_copy(void* shared, const void* global, int bytes, int source_bytes, const Site& site) {
  Machine& m = machine;
  check_aligned(shared, bytes, site);
  check_aligned(global, bytes, site);
  if (source_bytes < 0 || source_bytes > bytes)
    fatal("cp_async of " + std::to_string(source_bytes) + " source bytes at " + where(site));
  check_shared(true, shared, bytes, site);
  log_access(Access::kSharedStore, shared, bytes, site);
  if (source_bytes) log_access(Access::kGlobalLoad, global, source_bytes, site);
  Thread& self = m.threads[m.running];
  const Copy copy{shared, global, bytes, source_bytes, self.open_group, site};
  if (m.seed % 2) return complete(copy);
  m.shared.set_pending(shared, bytes, true);
  self.copies.push_back(copy);
}

void async_commit() { ++machine.threads[machine.running].open_group; }

void async_wait(int pending) {
  Thread& self = machine.threads[machine.running];
  size_t finished = 0;
  while (finished < self.copies.size() && self.copies[finished].group < self.open_group - pending)
    complete(self.copies[finished++]);
  self.copies.erase(self.copies.begin(), self.copies.begin() + finished);
}

}  // namespace densenet_efficient::emulation
