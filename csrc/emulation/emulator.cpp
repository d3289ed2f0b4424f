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

#include "fiber.h"

namespace densenet_efficient::emulation {
namespace {

constexpr int kWarp = 32, kNobody = -1;

std::string where(const Site& site) {
  const std::string file = site.file_name();
  return file.substr(file.find_last_of('/') + 1) + ":" + std::to_string(site.line());
}

// ---- Counting -----------------------------------------------------------------------------------

// One warp-wide access: the lanes that took part and their addresses.
struct Request {
  uint32_t lanes = 0;
  uintptr_t address[kWarp];
  uint8_t bytes[kWarp];
};

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

// Memory that belongs to one tensor, and which of its sectors a launch has touched.
struct Range {
  std::string name;
  uintptr_t begin, end;
  std::vector<bool> touched[2];  // by loads, by stores
};
std::vector<Range> ranges;

// Whose memory this is: an index into a launch's tensors, of which the last is the workspace.
size_t owner_of(uintptr_t address) {
  size_t index = 0;
  while (index < ranges.size() && (address < ranges[index].begin || address >= ranges[index].end))
    ++index;
  return index;
}

// Distinct sectors of 32 bytes that a request touches.
void count_global(const Request& request, SiteCounters& site,
                  std::vector<TensorCounters>& tensors) {
  uintptr_t sectors[2 * kWarp], seen[kWarp];
  int num_sectors = 0, num_seen = 0;
  int64_t bytes = 0;
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(request.lanes >> lane & 1) || !request.bytes[lane]) continue;
    const uintptr_t address = request.address[lane];
    if (std::find(seen, seen + num_seen, address) != seen + num_seen) continue;
    seen[num_seen++] = address;
    bytes += request.bytes[lane];
    sectors[num_sectors++] = address / 32;
    if ((address + request.bytes[lane] - 1) / 32 != address / 32)
      sectors[num_sectors++] = (address + request.bytes[lane] - 1) / 32;
  }
  if (!num_sectors) return;
  std::sort(sectors, sectors + num_sectors);
  num_sectors = static_cast<int>(std::unique(sectors, sectors + num_sectors) - sectors);
  site.requests += 1;
  site.bytes += bytes;
  site.units += num_sectors;
  site.ideal += (bytes + 31) / 32;

  const bool store = site.access == Access::kGlobalStore;
  const size_t owner = owner_of(seen[0]);
  TrafficCounters& traffic = store ? tensors[owner].store : tensors[owner].load;
  traffic.bytes += bytes;
  traffic.sectors += num_sectors;
  traffic.ideal += (bytes + 31) / 32;
  if (owner == ranges.size()) return;
  std::vector<bool>& touched = ranges[owner].touched[store];
  for (int i = 0; i < num_sectors; ++i) {
    const size_t sector = sectors[i] - ranges[owner].begin / 32;
    if (sector < touched.size() && !touched[sector]) {
      touched[sector] = true;
      ++traffic.distinct;
    }
  }
}

// Wavefronts of 32 banks x 4 bytes: lanes go together 32, 16 or 8 at a time (accesses of up to 4, 8
// or 16 bytes); within such a phase distinct words of one bank follow each other.
void count_shared(const Request& request, uintptr_t base, SiteCounters& site) {
  int width = 4;
  for (int lane = 0; lane < kWarp; ++lane)
    if (request.lanes >> lane & 1) width = std::max<int>(width, request.bytes[lane]);
  const int phase_lanes = kWarp * 4 / width;
  site.requests += 1;
  for (int first = 0; first < kWarp; first += phase_lanes) {
    uintptr_t words[kWarp];
    int count = 0, in_bank[32] = {}, worst = 0;
    for (int lane = first; lane < first + phase_lanes; ++lane) {
      if (!(request.lanes >> lane & 1)) continue;
      for (int byte = 0; byte < request.bytes[lane]; byte += 4) {
        const uintptr_t word = (request.address[lane] - base + byte) / 4;
        if (std::find(words, words + count, word) != words + count) continue;
        words[count++] = word;
        worst = std::max(worst, ++in_bank[word % 32]);
      }
      site.bytes += request.bytes[lane];
    }
    site.units += worst;
    site.ideal += (count + 31) / 32;
  }
}

// ---- Races --------------------------------------------------------------------------------------

// Who touched a byte of shared memory, and in which interval between barriers of the block (and of
// the warp). Two threads that touch the same byte in one interval race if one of them writes.
struct Shadow {
  uint32_t write_interval = 0, write_warp_interval = 0;
  uint32_t read_interval = 0, read_warp_interval = 0;
  int16_t writer = kNobody, reader = kNobody;
  bool read_by_warps = false, read_by_lanes = false;  // by several
  bool copy_pending = false;                          // an asynchronous copy is on its way
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
  unsigned char* shared = nullptr;
  int64_t shared_bytes = 0;
  std::vector<Shadow> shadow;
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
        count_shared(request, reinterpret_cast<uintptr_t>(m.shared), site);
    }
    log.requests.clear();
    std::fill(log.occurrences, log.occurrences + kWarp, 0);
  }
  warp.touched.clear();
}

// ---- Race checks --------------------------------------------------------------------------------

// What one access means for another of the same interval: true if the two are ordered.
bool ordered(const Thread& self, int other, uint32_t other_warp_interval) {
  if (other == self.position.thread) return true;
  if (other / kWarp != self.position.warp) return false;
  return other_warp_interval < machine.warps[self.position.warp].interval;
}

void check_shared(bool write, const void* pointer, int bytes, const Site& site) {
  Machine& m = machine;
  const Thread& self = m.threads[m.running];
  const Warp& warp = m.warps[self.position.warp];
  const int64_t offset = static_cast<const unsigned char*>(pointer) - m.shared;
  if (!m.shared || offset < 0 || offset + bytes > m.shared_bytes)
    fatal("access outside of shared memory at " + where(site));
  for (int64_t i = offset; i < offset + bytes; ++i) {
    Shadow& byte = m.shadow[i];
    if (byte.copy_pending)
      fatal("shared memory touched before its asynchronous copy was waited for, at " + where(site));
    if (byte.write_interval == m.interval && !ordered(self, byte.writer, byte.write_warp_interval))
      fatal("race: shared byte " + std::to_string(i) + " was written by thread " +
            std::to_string(byte.writer) + " without a barrier before this " +
            (write ? "write" : "read") + " at " + where(site));
    const bool read_now = byte.read_interval == m.interval;
    if (write) {
      if (read_now && (byte.read_by_warps || !ordered(self, byte.reader, byte.read_warp_interval) ||
                       (byte.read_by_lanes && byte.read_warp_interval >= warp.interval)))
        fatal("race: shared byte " + std::to_string(i) + " was read by thread " +
              std::to_string(byte.reader) + " without a barrier before this write at " +
              where(site));
      byte.write_interval = m.interval;
      byte.write_warp_interval = warp.interval;
      byte.writer = static_cast<int16_t>(self.position.thread);
    } else {
      const bool same_warp = read_now && byte.reader / kWarp == self.position.warp;
      byte.read_by_warps = read_now && (byte.read_by_warps || !same_warp);
      byte.read_by_lanes = same_warp && byte.read_warp_interval == warp.interval &&
                           (byte.read_by_lanes || byte.reader != self.position.thread);
      byte.read_interval = m.interval;
      byte.read_warp_interval = warp.interval;
      byte.reader = static_cast<int16_t>(self.position.thread);
    }
  }
}

void mark_pending(const void* pointer, int bytes, bool pending) {
  const int64_t offset = static_cast<const unsigned char*>(pointer) - machine.shared;
  for (int64_t i = offset; i < offset + bytes; ++i) machine.shadow[i].copy_pending = pending;
}

void complete(const Copy& copy) {
  std::memcpy(copy.shared, copy.global, copy.source_bytes);
  std::memset(static_cast<char*>(copy.shared) + copy.source_bytes, 0,
              copy.bytes - copy.source_bytes);
  mark_pending(copy.shared, copy.bytes, false);
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
  if (m.shared) std::memset(m.shared, 0xff, m.shared_bytes);  // NaN in every floating-point format
  m.shadow.assign(m.shared_bytes, Shadow{});
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

void name_range(const char* name, const void* begin, int64_t bytes) {
  if (!name) return ranges.clear();
  const uintptr_t first = reinterpret_cast<uintptr_t>(begin);
  if (bytes > 0) ranges.push_back({name, first, first + bytes, {}});
}

const ThreadPosition& position() { return machine.threads[machine.running].position; }
unsigned char* shared_block() { return machine.shared; }

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
  for (Range& range : ranges) {
    m.counters->tensors.push_back({range.name, {}, {}});
    for (std::vector<bool>& touched : range.touched)
      touched.assign((range.end - 1) / 32 - range.begin / 32 + 1, false);
  }
  m.counters->tensors.push_back({"workspace", {}, {}});
  m.sites.clear();
  m.body = &body;
  m.error.clear();
  m.threads.assign(block, Thread{});
  m.warps.assign(block / kWarp, Warp{});
  m.shared_bytes = shared_bytes;
  m.shared = nullptr;
  void* shared = nullptr;
  if (shared_bytes && posix_memalign(&shared, 128, shared_bytes))
    throw std::runtime_error("emulation: no memory for shared memory");
  m.shared = static_cast<unsigned char*>(shared);

  std::vector<int64_t> blocks(int64_t(grid_x) * grid_y);
  std::iota(blocks.begin(), blocks.end(), 0);
  if (m.seed == 1) std::reverse(blocks.begin(), blocks.end());
  if (m.seed > 1) std::shuffle(blocks.begin(), blocks.end(), m.random);
  for (const int64_t b : blocks) {
    run_block(static_cast<int>(b % grid_x), static_cast<int>(b / grid_x));
    if (!m.error.empty()) break;
  }
  std::free(shared);
  m.shared = nullptr;
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
  mark_pending(shared, bytes, true);
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
