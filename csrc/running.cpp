// The running statistics of a call's norms by one operator, where that takes them: of one dtype and
// device, contiguous, no negative views, and no memory in two places.
#include <algorithm>
#include <vector>

#include "calls.h"
#include "stable.h"

namespace densenet_efficient {
namespace {

// Where a tensor is and what it holds.
struct Kind {
  int32_t dtype = 0, device = 0, index = 0;

  explicit Kind(const Handle& tensor) {
    check(aoti_torch_get_dtype(tensor.get(), &dtype), "a dtype");
    check(aoti_torch_get_device_type(tensor.get(), &device), "a device");
    check(aoti_torch_get_device_index(tensor.get(), &index), "a device");
  }
  bool operator==(const Kind&) const = default;
};

// Whether all are of one kind and contiguous; where they are is added to memory.
bool are_alike(const std::vector<Handle>& tensors, const Kind& kind,
               std::vector<const void*>& memory) {
  for (const Handle& tensor : tensors) {
    bool contiguous = false;
    check(aoti_torch_is_contiguous(tensor.get(), &contiguous), "a layout");
    if (!contiguous || Kind(tensor) != kind) return false;
    const void* data = nullptr;  // which leaves the sharing of copy-on-write memory
    check(torch_get_const_data_ptr(tensor.get(), &data), "memory");
    memory.push_back(data);
  }
  return true;
}

// Arguments and result of `running_update`, as the dispatcher hands them over.
void running_update(StableIValue* stack, uint64_t, uint64_t) {
  namespace values = torch::stable::detail;
  Handle table(values::to<AtenTensorHandle>(stack[0]));
  std::vector<Handle> means = elements(stack[1]), variances = elements(stack[2]),
                      batches = elements(stack[3]);
  const auto first = values::to<std::vector<int64_t>>(stack[4]);
  const Kind moment(table);
  Kind counter = moment;
  counter.dtype = aoti_torch_dtype_int64();
  std::vector<const void*> memory;
  memory.reserve(means.size() + variances.size() + batches.size());
  bool taken = are_alike(means, moment, memory) && are_alike(variances, moment, memory) &&
               are_alike(batches, counter, memory);
  std::sort(memory.begin(), memory.end());
  taken = taken && std::adjacent_find(memory.begin(), memory.end()) == memory.end();
  if (taken) {
    StableIValue arguments[] = {values::from(table.release()),
                                list_of(std::move(means)),
                                list_of(std::move(variances)),
                                list_of(std::move(batches)),
                                values::from(first),
                                stack[5],
                                stack[6]};
    call_operator("densenet_efficient::running_update", arguments);
  }
  stack[0] = values::from(taken);
}

// Where there is a negative view, whose memory holds the opposite of its values.
bool refuse(Tensor, std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>,
            std::vector<int64_t>, double, double) {
  return false;
}

}  // namespace
}  // namespace densenet_efficient

STABLE_TORCH_LIBRARY_FRAGMENT(densenet_efficient_calls, library) {
  // running_update, and true, where it takes the norms; nothing, and false, where not.
  library.def(
      "running_update(Tensor table, Tensor(a!)[] means, Tensor(b!)[] variances, "
      "Tensor(c!)[] batches, int[] first, float momentum, float unbiased) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(densenet_efficient_calls, CompositeExplicitAutograd, library) {
  library.impl("running_update", &densenet_efficient::running_update);
}

STABLE_TORCH_LIBRARY_IMPL(densenet_efficient_calls, Negative, library) {
  library.impl("running_update", TORCH_BOX(&densenet_efficient::refuse));
}
