// How a block's threads share the columns of [rows, channels]: host and device agree through this
// tiling, which follows from the shape and the alignment alone, so that results do not depend on
// the device. Neighbouring threads own neighbouring vectors of a row: accesses are coalesced.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../../integers.h"
#include "../../norm_relu.h"
#include "partials.h"

namespace densenet_efficient::tiling {

constexpr int kColumnThreads = 256;
constexpr int kMaxBlocks = 1024;  // of all groups together: a few for each multiprocessor

// The widest vector of up to `most` elements (a power of two) that divides the row and is no wider
// than `alignment` bytes, to which all rows are aligned.
inline int vector_width(int64_t channels, int64_t size, int64_t most, int64_t alignment) {
  int64_t width = most;
  while (width > 1 && (channels % width || width * size > alignment)) width /= 2;
  return static_cast<int>(width);
}

// Block (x, y) owns part x of the rows and group y of the columns.
struct Columns {
  int64_t rows;
  int channels;
  int vector;         // elements
  int group_vectors;  // vectors of a row that one block owns
  int groups;
  int lanes;          // rows that a block's threads work on at once
  int64_t part_rows;  // consecutive rows of a block
  int64_t parts;

  // loads: rows that a thread has in flight; a part is cut in whole steps of lanes * loads rows.
  // Groups end at sectors of 32 bytes where that leaves at most a quarter of the threads idle: no
  // two warps then share a sector.
  Columns(int64_t rows, int64_t channels, int vector, int64_t size, int loads)
      : rows(rows), channels(static_cast<int>(channels)), vector(vector) {
    constexpr int kGroupVectors = 64, kSector = 32;
    const int64_t vectors = std::max<int64_t>(1, channels / vector);
    groups = static_cast<int>(ceil_div(vectors, kGroupVectors));
    group_vectors = static_cast<int>(ceil_div(vectors, groups));
    const int in_sector = std::max(1, kSector / static_cast<int>(vector * size));
    const int whole = static_cast<int>(round_up(group_vectors, in_sector));
    if (3 * whole <= 4 * group_vectors) group_vectors = whole;
    lanes = kColumnThreads / group_vectors;
    const int64_t step = int64_t(lanes) * loads;
    const int64_t steps = std::max<int64_t>(1, ceil_div(rows, step));
    const int64_t most = std::max<int64_t>(1, kMaxBlocks / groups);
    const int64_t steps_each = ceil_div(steps, most);
    part_rows = steps_each * step;
    parts = ceil_div(steps, steps_each);
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

// ---- The operators that only pass over rows -----------------------------------------------------

struct ChannelStats {
  static constexpr int kLoads = 8;
  Columns columns;
  int64_t bytes;

  ChannelStats(int64_t rows, int64_t channels, int64_t size, int64_t alignment)
      : columns(rows, channels, vector_width(channels, size, 16 / size, alignment), size, kLoads),
        bytes(rows > 0 ? partial_bytes(columns.parts, kMomentRows, channels, size) : 0) {}
};

struct NormCorrectionApply {
  static constexpr int kLoads = 4;  // of x and of dx each
  Columns columns;

  NormCorrectionApply(int64_t rows, int64_t channels, int64_t size, int64_t alignment)
      : columns(rows, channels, vector_width(channels, size, 16 / size, alignment), size, kLoads) {}
};

}  // namespace densenet_efficient::tiling
