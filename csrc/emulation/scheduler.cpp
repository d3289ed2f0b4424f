// The scheduler: threads as fibers, barriers, launches; see emulator.h.
#include <algorithm>
#include <cstdlib>
#include <numeric>
#include <sstream>
#include <stdexcept>

#include "machine.h"

namespace densenet_efficient::emulation {

Machine machine;

namespace {

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

// Leaves the running context for a thread's fiber, or for the host (kNone).
void switch_to(int target, bool for_good = false) {
  Machine& m = machine;
  Context& from = m.running == kNone ? m.host : m.threads[m.running].context;
  Context& to = target == kNone ? m.host : m.threads[target].context;
  void** fake = m.running == kNone ? &m.host_fake_stack : &m.threads[m.running].fake_stack;
  m.running = target;
#if defined(DE_SANITIZE)
  __sanitizer_start_switch_fiber(for_good ? nullptr : fake,
                                 target == kNone ? m.host_bottom : m.stacks->stack(target),
                                 target == kNone ? m.host_size : Stacks::size());
#else
  (void)for_good;
#endif
  switch_context(from, to);
  arrived_from(*fake);
}

int next_thread() {
  Machine& m = machine;
  if (m.runnable.empty()) return kNone;
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

[[noreturn]] void fatal(const std::string& message) {
  const ThreadPosition& at = position();
  std::ostringstream text;
  text << message << " (thread " << at.thread << " of block " << at.block_x << ", " << at.block_y
       << ")";
  machine.error = text.str();
  switch_to(kNone, true);
  std::abort();
}

// ---- Interface ----------------------------------------------------------------------------------

void set_device(const DeviceFigures& figures) { machine.device = figures; }
const DeviceFigures& device() { return machine.device; }
void set_listing(bool listing) { machine.listing = listing; }
bool listing() { return machine.listing; }
void set_seed(uint64_t seed) { machine.seed = seed; }
const std::vector<Counters>& launches() { return machine.launches; }
void clear_launches() { machine.launches.clear(); }

const ThreadPosition& position() { return machine.threads[machine.running].position; }
unsigned char* shared_block() { return machine.shared.data(); }

void run(const char* op, const char* kernel, int grid_x, int grid_y, int block,
         int64_t shared_bytes, const Parameters& parameters, const std::function<void()>& body) {
  Machine& m = machine;
  if (grid_x < 1 || grid_y < 1 || grid_y > 65535 || block < 1 || block > 1024 || block % kWarp ||
      shared_bytes < 0 || shared_bytes > m.device.shared_bytes)
    throw std::runtime_error("emulation: impossible launch of " + std::string(kernel) + ": grid " +
                             std::to_string(grid_x) + " x " + std::to_string(grid_y) + ", block " +
                             std::to_string(block) + ", " + std::to_string(shared_bytes) +
                             " bytes of shared memory");
  m.launches.emplace_back();
  m.counters = &m.launches.back();
  m.counters->op = op;
  m.counters->kernel = kernel;
  m.counters->grid_x = grid_x;
  m.counters->grid_y = grid_y;
  m.counters->block = block;
  m.counters->shared_bytes = shared_bytes;
  m.counters->parameters = parameters;
  if (m.listing) return;
  if (!m.stacks || m.stacks->count() < block) m.stacks = std::make_unique<Stacks>(block);
  m.random.seed(m.seed);
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

}  // namespace densenet_efficient::emulation
