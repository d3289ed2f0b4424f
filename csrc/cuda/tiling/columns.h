// How a block's threads share the columns of [rows, channels]: host and device agree through this
// plan, which follows from the shape and the alignment alone, so that results do not depend on the
// device. Threads of neighbouring index own neighbouring vectors of a row: accesses are coalesced.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <utility>

#include "../../norm_relu.h"

namespace densenet_efficient {

constexpr int kColumnThreads = 256;
constexpr int kMaxBlocks = 1024;  // of all groups together: a few for each multiprocessor

// The widest vector of up to `most` elements (a power of two) that divides the row and to which
// every address is aligned.
inline int vector_width(int64_t channels, int64_t element_bytes, int64_t most,
                        std::initializer_list<std::pair<const void*, int64_t>> rows) {
  int64_t width = most;
  while (width > 1) {
    bool fits = channels % width == 0;
    for (const auto& [data, stride] : rows)
      fits = fits && reinterpret_cast<uintptr_t>(data) % (width * element_bytes) == 0 &&
             stride % width == 0;
    if (fits) break;
    width /= 2;
  }
  return static_cast<int>(width);
}

// Block (x, y) owns part x of the rows and group y of the columns.
struct Columns {
  int64_t rows;
  int channels;
  int vector;         // elements
  int group_vectors;  // vectors of a row that one block owns
  int groups;
  int lanes;          // rows that a block's threads stand on at once
  int64_t part_rows;  // consecutive rows of a block
  int64_t parts;

  // loads: rows that a thread has in flight; a part is cut in whole steps of lanes * loads rows.
  // Groups end at sectors of 32 bytes where that leaves at most a quarter of the threads idle: no
  // two warps then meet inside a sector.
  Columns(int64_t rows, int64_t channels, int vector, int64_t element_bytes, int loads)
      : rows(rows), channels(static_cast<int>(channels)), vector(vector) {
    constexpr int kGroupVectors = 64, kSector = 32;
    const int64_t vectors = std::max<int64_t>(1, channels / vector);
    groups = static_cast<int>((vectors + kGroupVectors - 1) / kGroupVectors);
    group_vectors = static_cast<int>((vectors + groups - 1) / groups);
    const int in_sector = std::max(1, kSector / static_cast<int>(vector * element_bytes));
    const int whole = (group_vectors + in_sector - 1) / in_sector * in_sector;
    if (3 * whole <= 4 * group_vectors) group_vectors = whole;
    lanes = kColumnThreads / group_vectors;
    const int64_t step = int64_t(lanes) * loads;
    const int64_t steps = std::max<int64_t>(1, (rows + step - 1) / step);
    const int64_t most = std::max<int64_t>(1, kMaxBlocks / groups);
    const int64_t steps_each = (steps + most - 1) / most;
    part_rows = steps_each * step;
    parts = (steps + steps_each - 1) / steps_each;
  }
};

// One thread's place in a block: its rows begin at `lane`, its channels at `channel`.
struct ColumnThread {
  int lane, column, channel;
  bool active;

  DE_HOST_DEVICE ColumnThread(const Columns& plan, int thread, int group)
      : lane(thread / plan.group_vectors), column(thread % plan.group_vectors) {
    channel = (group * plan.group_vectors + column) * plan.vector;
    active = lane < plan.lanes && channel < plan.channels;
  }
};

}  // namespace densenet_efficient
