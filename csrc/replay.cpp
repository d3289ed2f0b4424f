// A recorded run of operators, made again without Python. densenet_efficient/core/replay.py records
// it and encodes it as whole numbers:
//
//   program      number of given tensors, for each: layout
//                number of other tensors; number of instructions, these; number of results,
//                these as references
//   layout       dtype (0 to 3: float64, float32, bfloat16, float16), number of dimensions, sizes,
//                strides
//   reference    number of a tensor (the given first); -1, for all of it, or number of dimensions,
//                elements from its first to that of the view, sizes, strides
//   instruction  0, tensor, layout                     a new tensor, uninitialised
//                1, reference, reference               the second is copied into the first
//                2, reference, bits of a double        all elements become a value
//                3, operator, number of arguments,     a call; an argument is 0 (none), 1 or 2
//                   arguments                          (reference; of an optional one), 3, value,
//                                                      or a list: 4, n, n references, or 5, n,
//                                                      n values
//                4, tensor                             it is not used any more
//                5, n, n references, n references      n copies into the first from the second
//                6, tensor, reference                  a view that is used more than once, under a
//                                                      number of its own
//
// Every tensor that is given must have the layout that it had when the program was recorded;
// operators check their arguments as in any other call.
#include <algorithm>
#include <bit>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "calls.h"
#include "stable.h"

namespace densenet_efficient {
namespace {

enum class Status : int64_t { kDone, kOtherLayout, kNoMemory };

// In the order of densenet_efficient/ops/interface.py, and then what the CPU alone has.
constexpr const char* kOperators[] = {
    "densenet_efficient::channel_stats",
    "densenet_efficient::norm_fold",
    "densenet_efficient::norm_correction",
    "densenet_efficient::norm_correction_apply",
    "densenet_efficient::norm_relu_conv1x1_forward",
    "densenet_efficient::norm_relu_conv1x1_backward",
    "densenet_efficient::norm_relu_conv3x3_forward",
    "densenet_efficient::norm_relu_conv3x3_backward",
    "densenet_efficient::transition_forward",
    "densenet_efficient::transition_backward",
    "densenet_efficient::stem_forward",
    "densenet_efficient::stem_backward",
    "densenet_efficient::norm_fold_all",
};
constexpr int64_t kMostArguments = 16;

int32_t dtype_of(int64_t code) {
  switch (code) {
    case 0: return aoti_torch_dtype_float64();
    case 1: return aoti_torch_dtype_float32();
    case 2: return aoti_torch_dtype_bfloat16();
    default: return aoti_torch_dtype_float16();
  }
}

class Run {
 public:
  Run(const int64_t* program, const std::vector<Handle>& given) : at_(program), given_(given) {}

  Status operator()(std::vector<Handle>& results) {
    if (!as_recorded()) return Status::kOtherLayout;
    made_.resize(next());
    for (int64_t left = next(); left > 0; --left)
      if (!instruction()) return Status::kNoMemory;
    const int64_t count = next();
    results.reserve(count);
    for (int64_t i = 0; i < count; ++i) results.push_back(reference());
    return Status::kDone;
  }

 private:
  const int64_t* at_;
  const std::vector<Handle>& given_;
  std::vector<Handle> made_;

  int64_t next() { return *at_++; }
  const int64_t* next(int64_t count) { return std::exchange(at_, at_ + count); }

  bool as_recorded() {
    if (next() != static_cast<int64_t>(given_.size())) return false;
    for (const Handle& tensor : given_) {
      int32_t dtype = 0;
      int64_t own_dims = 0, *own_sizes = nullptr, *own_strides = nullptr;
      check(aoti_torch_get_dtype(tensor.get(), &dtype), "a dtype");
      check(aoti_torch_get_dim(tensor.get(), &own_dims), "a shape");
      check(aoti_torch_get_sizes(tensor.get(), &own_sizes), "a shape");
      check(aoti_torch_get_strides(tensor.get(), &own_strides), "strides");
      const int32_t expected = dtype_of(next());
      const int64_t dims = next();
      const int64_t *sizes = next(dims), *strides = next(dims);
      if (dtype != expected || own_dims != dims || !std::equal(sizes, sizes + dims, own_sizes) ||
          !std::equal(strides, strides + dims, own_strides))
        return false;
    }
    return true;
  }

  AtenTensorHandle tensor(int64_t index) const {
    const int64_t given = static_cast<int64_t>(given_.size());
    return index < given ? given_[index].get() : made_[index - given].get();
  }

  // A reference of its own, for whoever takes it.
  Handle reference() {
    const AtenTensorHandle whole = tensor(next());
    const int64_t dims = next();
    Handle found;
    if (dims < 0) {
      check(aoti_torch_new_tensor_handle(whole, found.out()), "a reference");
      return found;
    }
    const int64_t offset = next();  // from whole's own
    const int64_t *sizes = next(dims), *strides = next(dims);
    check(aoti_torch__reinterpret_tensor(whole, dims, sizes, strides, offset, found.out()),
          "a view");
    return found;
  }

  // False where there is no memory.
  bool instruction() {
    switch (next()) {
      case 0: return make();
      case 1: {
        const Handle to = reference(), from = reference();
        check(aoti_torch_copy_(to.get(), from.get(), 0), "a copy");
        return true;
      }
      case 2: {
        const Handle to = reference();
        check(aoti_torch_aten_fill__Scalar(to.get(), std::bit_cast<double>(next())), "a filling");
        return true;
      }
      case 3: call(); return true;
      case 5: copy_together(); return true;
      case 6: view(); return true;
      default: made_[next() - static_cast<int64_t>(given_.size())] = Handle(); return true;
    }
  }

  void copy_together() {
    const int64_t count = next();
    StableIValue stack[3] = {references(count), references(count),
                             torch::stable::detail::from(false)};
    call_operator("aten::_foreach_copy_", stack);
  }
  StableIValue references(int64_t count) {
    std::vector<Handle> tensors;
    tensors.reserve(count);
    for (int64_t i = 0; i < count; ++i) tensors.push_back(reference());
    return list_of(std::move(tensors));
  }

  StableIValue numbers(int64_t count) {
    const int64_t* first = next(count);
    return torch::stable::detail::from(std::vector<int64_t>(first, first + count));
  }

  void view() {
    const int64_t index = next() - static_cast<int64_t>(given_.size());
    made_[index] = reference();
  }

  bool make() {
    const int64_t index = next() - static_cast<int64_t>(given_.size());
    const int32_t dtype = dtype_of(next());
    const int64_t dims = next();
    const int64_t *sizes = next(dims), *strides = next(dims);
    int32_t type = 0, number = 0;
    check(aoti_torch_get_device_type(given_[0].get(), &type), "a device");
    check(aoti_torch_get_device_index(given_[0].get(), &number), "a device");
    return aoti_torch_empty_strided(dims, sizes, strides, dtype, type, number,
                                    made_[index].out()) == AOTI_TORCH_SUCCESS;
  }

  void call() {
    const char* name = kOperators[next()];
    StableIValue stack[kMostArguments];
    const int64_t count = next();
    for (int64_t i = 0; i < count; ++i) {
      const int64_t kind = next();
      if (kind == 0) stack[i] = torch::stable::detail::from(std::nullopt);
      if (kind == 1) stack[i] = torch::stable::detail::from(reference().release());
      if (kind == 2) stack[i] = torch::stable::detail::from(std::optional(reference().release()));
      if (kind == 3) stack[i] = static_cast<StableIValue>(next());
      if (kind == 4) stack[i] = references(next());
      if (kind == 5) stack[i] = numbers(next());
    }
    call_operator(name, stack);
  }
};

// The arguments and the results of `replay`, as the dispatcher hands them over.
void replay(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor program(torch::stable::detail::to<AtenTensorHandle>(stack[0]));
  const std::vector<Handle> given = elements(stack[1]);
  std::vector<Handle> results;
  const Status status = Run(static_cast<const int64_t*>(program.const_data_ptr()), given)(results);
  stack[0] = torch::stable::detail::from(static_cast<int64_t>(status));
  stack[1] = list_of(std::move(results));
}

// Where a negative view is given, whose memory holds the opposite of its values: operators read a
// copy of it, which no program knows.
std::tuple<int64_t, std::vector<Tensor>> refuse(Tensor, std::vector<Tensor>) {
  return {static_cast<int64_t>(Status::kOtherLayout), {}};
}

}  // namespace
}  // namespace densenet_efficient

STABLE_TORCH_LIBRARY(densenet_efficient_calls, library) {
  // A program, and the tensors that it begins with. 0 and the results; 1 where a tensor has another
  // layout or is a negative view, and 2, after a part of it has run, where there was no memory for
  // a new one.
  library.def("replay(Tensor program, Tensor(a!)[] given) -> (int, Tensor[])");
}

STABLE_TORCH_LIBRARY_IMPL(densenet_efficient_calls, CompositeExplicitAutograd, library) {
  library.impl("replay", &densenet_efficient::replay);
}

STABLE_TORCH_LIBRARY_IMPL(densenet_efficient_calls, Negative, library) {
  library.impl("replay", TORCH_BOX(&densenet_efficient::refuse));
}
