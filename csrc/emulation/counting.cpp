// Counting; see counting.h.
#include "counting.h"

#include <algorithm>
#include <string>
#include <utility>

namespace densenet_efficient::emulation {
namespace {

// Memory that belongs to one tensor, and which bytes of its sectors a launch has touched.
struct Range {
  std::string name;
  uintptr_t begin, end;
  std::vector<uint32_t> touched[2];  // by loads, by stores
};
std::vector<Range> ranges;

std::vector<CountedWorkspace*> workspaces;
WorkspaceCounters workspace_counters;

// Whose memory this is: an index into a launch's tensors, of which the last is the workspace.
size_t owner_of(uintptr_t address) {
  size_t index = 0;
  while (index < ranges.size() && (address < ranges[index].begin || address >= ranges[index].end))
    ++index;
  return index;
}

// Marks bytes [first, first + count) from the first sector of a range on.
void touch(std::vector<uint32_t>& touched, uintptr_t first, int count, TrafficCounters& traffic) {
  for (uintptr_t byte = first; byte < first + count; ++byte) {
    if (byte / 32 >= touched.size()) return;
    uint32_t& sector = touched[byte / 32];
    const uint32_t bit = 1u << byte % 32;
    traffic.distinct += sector == 0;
    traffic.distinct_bytes += !(sector & bit);
    sector |= bit;
  }
}

}  // namespace

CountedWorkspace::CountedWorkspace(const void* begin, int64_t bytes)
    : begin_(reinterpret_cast<uintptr_t>(begin)), stored_(bytes) {
  workspaces.push_back(this);
  workspace_counters.live += bytes;
  workspace_counters.peak = std::max(workspace_counters.peak, workspace_counters.live);
}

CountedWorkspace::~CountedWorkspace() {
  std::erase(workspaces, this);
  workspace_counters.live -= static_cast<int64_t>(stored_.size());
  workspace_counters.unused += std::count(stored_.begin(), stored_.end(), false);
}

void CountedWorkspace::note_store(uintptr_t address, int bytes) {
  if (address < begin_ || address >= begin_ + stored_.size()) return;
  const auto first = stored_.begin() + static_cast<int64_t>(address - begin_);
  std::fill(first, std::min(first + bytes, stored_.end()), true);
}

WorkspaceCounters take_workspace_counters() {
  const int64_t live = workspace_counters.live;
  return std::exchange(workspace_counters, WorkspaceCounters{live, live, 0});
}

void name_range(const char* name, const void* begin, int64_t bytes) {
  if (!name) return ranges.clear();
  const uintptr_t first = reinterpret_cast<uintptr_t>(begin);
  if (bytes > 0) ranges.push_back({name, first, first + bytes, {}});
}

void start_counting(std::vector<TensorCounters>& tensors) {
  for (Range& range : ranges) {
    tensors.push_back({range.name, {}, {}});
    for (std::vector<uint32_t>& touched : range.touched)
      touched.assign((range.end - 1) / 32 - range.begin / 32 + 1, 0);
  }
  tensors.push_back({"workspace", {}, {}});
}

void count_global(const Request& request, SiteCounters& site,
                  std::vector<TensorCounters>& tensors) {
  uintptr_t sectors[2 * kWarp], seen[kWarp];
  int widths[kWarp];
  int num_sectors = 0, num_seen = 0;
  int64_t bytes = 0;
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(request.lanes >> lane & 1) || !request.bytes[lane]) continue;
    const uintptr_t address = request.address[lane];
    if (std::find(seen, seen + num_seen, address) != seen + num_seen) continue;
    widths[num_seen] = request.bytes[lane];
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
  if (owner == ranges.size()) {
    if (!store) return;
    for (CountedWorkspace* workspace : workspaces)
      for (int i = 0; i < num_seen; ++i) workspace->note_store(seen[i], widths[i]);
    return;
  }
  for (int i = 0; i < num_seen; ++i)
    touch(ranges[owner].touched[store], seen[i] - ranges[owner].begin / 32 * 32, widths[i],
          traffic);
}

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

}  // namespace densenet_efficient::emulation
