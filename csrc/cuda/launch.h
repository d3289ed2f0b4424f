// What every launcher does around its kernels: device guard, current stream, launch and its check,
// dispatch on the dtype, registration. In the host emulation a launch runs the kernel on the spot.
#pragma once

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

#include "../arguments.h"
#include "../integers.h"
#include "device.cuh"
#include "tiling/device.h"

#if defined(DE_EMULATE)
#include "../emulation/emulator.h"
#else
#include <cuda_runtime.h>
#include <dlfcn.h>

#include <atomic>
#include <cstdlib>
#include <fstream>
#include <mutex>
#include <set>
#include <tuple>
#endif

// Registers a file's launchers: DE_REGISTER(m) { m.impl("operator", TORCH_BOX(&operator_function));
// }
#if defined(DE_EMULATE)
#define DE_REGISTER(m) STABLE_TORCH_LIBRARY_IMPL(densenet_efficient, CPU, m)
#else
#define DE_REGISTER(m) STABLE_TORCH_LIBRARY_IMPL(densenet_efficient, CUDA, m)
#endif

namespace densenet_efficient {

// Grid, threads of a block, dynamic shared memory of a block.
struct LaunchShape {
  int64_t grid_x = 1;
  int64_t grid_y = 1;
  int block = 256;
  int64_t shared_bytes = 0;
  // For reports: what persistent blocks walk over. So many static ranges of so many tiles, each
  // range with grid_x / ranges blocks; none where blocks do something else.
  int64_t tiles = 0, ranges = 0;
};

using tiling::Device;

// The CUDA kernels know images of two dimensions.
inline void check_two_dimensional(const arguments::ImageArguments& call) {
  if (call.dims != 2)
    fail(call.lead, "must have 4 dimensions, got shape ", shape_text(call.lead.tensor));
}

#if defined(DE_EMULATE)

class Launcher {
 public:
  explicit Launcher(const Arg& lead) : op_(lead.op) {}
  const Device& device() const { return device_; }

  template <auto kernel, typename... Args>
  void launch(const LaunchShape& shape, const Args&... args) const {
    emulation::Parameters parameters{{}, shape.tiles, shape.ranges};
    (parameters.append(args), ...);
    emulation::run(op_, __PRETTY_FUNCTION__, static_cast<int>(shape.grid_x),
                   static_cast<int>(shape.grid_y), shape.block, shape.shared_bytes, parameters,
                   [&] { kernel(args...); });
  }
  void clear(void* pointer, int64_t bytes) const {
    if (!emulation::listing()) __builtin_memset(pointer, 0, bytes);
  }

 private:
  const char* op_;
  Device device_{emulation::device().multiprocessors, emulation::device().shared_bytes};
};

#else

constexpr int kMaxDevices = 64;

// Fails with the operator's name and the runtime's words.
inline void check_cuda(cudaError_t error, const char* op, const char* what) {
  if (error == cudaSuccess) return;
  std::ostringstream text;
  text << "densenet_efficient::" << op << ": " << what << " failed: " << cudaGetErrorString(error);
  throw std::runtime_error(text.str());
}

// Figures of a device, asked once per device; where that fails, the next call asks again.
inline const Device& device_figures(int index, const char* op) {
  static Device devices[kMaxDevices];
  static std::once_flag asked[kMaxDevices];
  if (index < 0 || index >= kMaxDevices) throw std::runtime_error("device index out of range");
  std::call_once(asked[index], [index, op] {
    const auto ask = [&](cudaDeviceAttr attribute) {
      int figure = 0;
      check_cuda(cudaDeviceGetAttribute(&figure, attribute, index), op, "asking for the device");
      return figure;
    };
    devices[index] = {ask(cudaDevAttrMultiProcessorCount),
                      ask(cudaDevAttrMaxSharedMemoryPerBlockOptin)};
  });
  return devices[index];
}

// The stream torch runs on. The function lives in libtorch_cuda, which this library is not linked
// against (it also loads next to a CPU-only torch), so it is looked up in the loaded library.
inline cudaStream_t current_stream(int device) {
  using GetStream = int32_t (*)(int32_t, void**);
  static const GetStream get_stream = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    void* symbol = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
    if (!symbol) throw std::runtime_error("densenet_efficient: libtorch_cuda.so is not loaded");
    return reinterpret_cast<GetStream>(symbol);
  }();
  void* stream = nullptr;
  if (get_stream(device, &stream) != 0)
    throw std::runtime_error("densenet_efficient: no current CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

// Where DENSENET_EFFICIENT_OCCUPANCY names a file: a line for each kernel and launch configuration,
// with the blocks that a multiprocessor holds of it according to the runtime.
// tools/predict/occupancy.py compares them with what the tilings assume.
inline void report_occupancy(const char* name, const void* kernel, const LaunchShape& shape) {
  static const char* const path = std::getenv("DENSENET_EFFICIENT_OCCUPANCY");
  if (!path) return;
  using Configuration = std::tuple<const void*, int, int64_t>;
  static std::mutex mutex;
  static std::set<Configuration> reported;
  const std::lock_guard<std::mutex> lock(mutex);
  if (!reported.emplace(kernel, shape.block, shape.shared_bytes).second) return;
  int blocks = 0;
  check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, shape.block,
                                                           static_cast<size_t>(shape.shared_bytes)),
             name, "asking for the occupancy");
  std::ofstream(path, std::ios::app)
      << blocks << ' ' << shape.block << ' ' << shape.shared_bytes << ' ' << name << '\n';
}

// Makes the tensor's device current for its lifetime and launches kernels on torch's stream there.
class Launcher {
 public:
  explicit Launcher(const Arg& lead)
      : op_(lead.op),
        index_(lead.tensor.get_device()),
        guard_(index_),
        device_(device_figures(index_, lead.op)),
        stream_(current_stream(index_)) {}

  const Device& device() const { return device_; }

  template <auto kernel, typename... Args>
  void launch(const LaunchShape& shape, const Args&... args) const {
    if (shape.shared_bytes > 0) ask_for_shared<kernel>(shape.shared_bytes);
    report_occupancy(__PRETTY_FUNCTION__, reinterpret_cast<const void*>(kernel), shape);
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(shape.grid_x), static_cast<unsigned>(shape.grid_y));
    config.blockDim = dim3(static_cast<unsigned>(shape.block));
    config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
    config.stream = stream_;
    check(cudaLaunchKernelEx(&config, kernel, args...), "launch");
  }
  void clear(void* pointer, int64_t bytes) const {
    check(cudaMemsetAsync(pointer, 0, bytes, stream_), "clearing a workspace");
  }

 private:
  // Properties of kernel and device, asked once and for all: a block's limit, raised to the
  // device's, and that shared memory comes before the L1 cache, which shares its place.
  template <auto kernel>
  void ask_for_shared(int64_t bytes) const {
    constexpr int64_t kDefaultLimit = 48 * 1024;
    static std::atomic<int64_t> asked[kMaxDevices];
    const int64_t limit = bytes > kDefaultLimit ? device_.shared_bytes : kDefaultLimit;
    if (asked[index_].load(std::memory_order_relaxed) >= limit) return;
    if (limit > kDefaultLimit)
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(limit)),
            "asking for shared memory");
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                               cudaSharedmemCarveoutMaxShared),
          "asking for shared memory before the L1 cache");
    asked[index_].store(limit, std::memory_order_relaxed);
  }
  void check(cudaError_t error, const char* what) const { check_cuda(error, op_, what); }

  const char* op_;
  int index_;
  torch::stable::accelerator::DeviceGuard guard_;
  const Device& device_;
  cudaStream_t stream_;
};

#endif  // DE_EMULATE

// dispatch_activation for the tensor-core operators: 16-bit types, and float32, whose products are
// TF32. Without TF32, and for float64, they take the fallback in Python.
template <typename F>
void dispatch_operands(const Arg& lead, F&& f) {
  switch (lead.tensor.scalar_type()) {
    case ScalarType::BFloat16: return f(BFloat16{});
    case ScalarType::Half: return f(Half{});
    case ScalarType::Float: return f(float{});
    default:
      fail(lead, "must be bfloat16, float16 or float32, got ",
           dtype_text(lead.tensor.scalar_type()));
  }
}

// Calls f<V>() with V = width, a power of two up to Most.
template <int Most, typename F>
void dispatch_width(int width, F&& f) {
  if constexpr (Most > 1) {
    if (width < Most) return dispatch_width<Most / 2>(width, f);
  }
  f.template operator()<Most>();
}

// The widest access in bytes, up to 16, to which every row of these tensors is aligned.
inline int64_t row_alignment(std::initializer_list<Strided> tensors) {
  uint64_t all = 16;
  for (const Strided& rows : tensors)
    all |= reinterpret_cast<uintptr_t>(rows.tensor->const_data_ptr()) |
           static_cast<uint64_t>(rows.stride) * rows.tensor->element_size();
  return static_cast<int64_t>(all & (~all + 1));
}

// Zeroes the first `channels` columns of a table: what sums over no rows come to.
template <typename A>
void clear_table(const Launcher& launcher, Rows<A> table, int64_t rows, int64_t channels) {
  for (int64_t row = 0; row < rows; ++row)
    launcher.clear(table[row], channels * static_cast<int64_t>(sizeof(A)));
}

}  // namespace densenet_efficient
