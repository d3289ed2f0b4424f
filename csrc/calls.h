// Calls of operators, the library's own and PyTorch's, through the dispatcher, which shows them to
// whoever looks on: a profiler, a sanitizer, a test. Tensors are held as plainly as they can be:
// there are thousands in a step.
#pragma once

#include <dlfcn.h>

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "stable.h"

namespace densenet_efficient {

// What an operator had to say, in versions of torch that keep it.
[[noreturn]] inline void fail_call(const char* what) {
  using Text = const char* (*)();
  const auto text =
      reinterpret_cast<Text>(dlsym(RTLD_DEFAULT, "torch_exception_get_what_without_backtrace"));
  throw std::runtime_error(text ? text() : std::string(what) + " failed");
}

inline void check(AOTITorchError code, const char* what) {
  if (code != AOTI_TORCH_SUCCESS) fail_call(what);
}

// An owned reference to a tensor, or none.
class Handle {
 public:
  Handle() = default;
  explicit Handle(AtenTensorHandle handle) : handle_(handle) {}
  Handle(Handle&& other) noexcept : handle_(other.release()) {}
  Handle& operator=(Handle&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Handle() {
    if (handle_) aoti_torch_delete_tensor_object(handle_);
  }
  AtenTensorHandle get() const { return handle_; }
  AtenTensorHandle* out() { return &handle_; }
  AtenTensorHandle release() { return std::exchange(handle_, nullptr); }

 private:
  AtenTensorHandle handle_ = nullptr;
};

// The elements of a list, which is taken over.
inline std::vector<Handle> elements(StableIValue value) {
  const auto list = torch::stable::detail::to<StableListHandle>(value);
  size_t count = 0;
  check(torch_list_size(list, &count), "a list");
  std::vector<Handle> found;
  found.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    StableIValue element;
    check(torch_list_get_item(list, i, &element), "a list");
    found.emplace_back(torch::stable::detail::to<AtenTensorHandle>(element));
  }
  check(torch_delete_list(list), "a list");
  return found;
}

inline StableIValue list_of(std::vector<Handle> handles) {
  StableListHandle list = nullptr;
  check(torch_new_list_reserve_size(handles.size(), &list), "a list");
  for (Handle& handle : handles)
    check(torch_list_push_back(list, torch::stable::detail::from(handle.release())), "a list");
  return torch::stable::detail::from(list);
}

// stack: the arguments, which the call takes over, and after it the results.
inline void call_operator(const char* name, StableIValue* stack) {
  check(torch_call_dispatcher(name, "", stack, TORCH_ABI_VERSION), name);
}

}  // namespace densenet_efficient
