// Shared memory and its races; see shared_memory.h.
#include "shared_memory.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>

namespace densenet_efficient::emulation {
namespace {

constexpr int kWarp = 32;

// Whether what `other` did before is over for certain when `self` acts, in the same interval.
bool ordered(const Toucher& self, int other, uint32_t other_warp_interval) {
  if (other == self.thread) return true;
  return other / kWarp == self.thread / kWarp && other_warp_interval < self.warp_interval;
}

std::string race(int64_t byte, int other, const char* did, const char* does) {
  return "race: shared byte " + std::to_string(byte) + " was " + did + " by thread " +
         std::to_string(other) + " without a barrier before this " + does;
}

}  // namespace

void SharedMemory::allocate(int64_t bytes) {
  release();
  void* memory = nullptr;
  if (bytes > 0 && posix_memalign(&memory, 128, bytes))
    throw std::runtime_error("emulation: no memory for shared memory");
  data_ = static_cast<unsigned char*>(memory);
  size_ = bytes;
}

void SharedMemory::release() {
  std::free(data_);
  data_ = nullptr;
  size_ = 0;
}

void SharedMemory::start_block() {
  if (data_) std::memset(data_, 0xff, size_);  // NaN in every floating-point format
  bytes_.assign(size_, Byte{});
}

std::string SharedMemory::touch(bool write, const void* pointer, int bytes, const Toucher& self) {
  const int64_t first = static_cast<const unsigned char*>(pointer) - data_;
  if (!data_ || first < 0 || first + bytes > size_) return "access outside of shared memory";
  for (int64_t i = first; i < first + bytes; ++i) {
    Byte& byte = bytes_[i];
    if (byte.pending) return "shared memory touched before its asynchronous copy was waited for";
    if (byte.write_interval == self.interval &&
        !ordered(self, byte.writer, byte.write_warp_interval))
      return race(i, byte.writer, "written", write ? "write" : "read");
    const bool read_now = byte.read_interval == self.interval;
    if (write) {
      if (read_now && (byte.read_by_warps || !ordered(self, byte.reader, byte.read_warp_interval) ||
                       (byte.read_by_lanes && byte.read_warp_interval >= self.warp_interval)))
        return race(i, byte.reader, "read", "write");
      byte.write_interval = self.interval;
      byte.write_warp_interval = self.warp_interval;
      byte.writer = static_cast<int16_t>(self.thread);
    } else {
      const bool same_warp = read_now && byte.reader / kWarp == self.thread / kWarp;
      byte.read_by_warps = read_now && (byte.read_by_warps || !same_warp);
      byte.read_by_lanes = same_warp && byte.read_warp_interval == self.warp_interval &&
                           (byte.read_by_lanes || byte.reader != self.thread);
      byte.read_interval = self.interval;
      byte.read_warp_interval = self.warp_interval;
      byte.reader = static_cast<int16_t>(self.thread);
    }
  }
  return {};
}

void SharedMemory::set_pending(const void* pointer, int bytes, bool pending) {
  const int64_t first = static_cast<const unsigned char*>(pointer) - data_;
  for (int64_t i = first; i < first + bytes; ++i) bytes_[i].pending = pending;
}

}  // namespace densenet_efficient::emulation
