// Memory accesses: checked against the rules, logged by warp and place, counted when a warp
// synchronises.
#include <algorithm>
#include <cstring>

#include "machine.h"

namespace densenet_efficient::emulation {

std::string where(const Site& site) {
  const std::string file = site.file_name();
  return file.substr(file.find_last_of('/') + 1) + ":" + std::to_string(site.line());
}

SiteKey key_of(const Site& site, int kind) {
  return {site.file_name(), uint64_t(site.line()) << 24 | uint64_t(site.column()) << 4 | kind};
}

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

namespace {

void check_shared(bool write, const void* pointer, int bytes, const Site& site) {
  Machine& m = machine;
  const ThreadPosition& at = m.threads[m.running].position;
  const std::string wrong =
      m.shared.touch(write, pointer, bytes, {at.thread, m.interval, m.warps[at.warp].interval});
  if (!wrong.empty()) fatal(wrong + ", at " + where(site));
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

}  // namespace

void complete(const Copy& copy) {
  std::memcpy(copy.shared, copy.global, copy.source_bytes);
  std::memset(static_cast<char*>(copy.shared) + copy.source_bytes, 0,
              copy.bytes - copy.source_bytes);
  machine.shared.set_pending(copy.shared, copy.bytes, false);
  check_shared(true, copy.shared, copy.bytes, copy.site);
}

void note(Access access, const void* pointer, int bytes, const Site& site) {
  check_aligned(pointer, bytes, site);
  if (access == Access::kSharedLoad || access == Access::kSharedStore)
    check_shared(access == Access::kSharedStore, pointer, bytes, site);
  log_access(access, pointer, bytes, site);
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
