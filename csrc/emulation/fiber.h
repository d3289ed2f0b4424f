// Fibers: a stack and a saved stack pointer. On x86-64 a switch is a dozen instructions
// (swapcontext makes two system calls); elsewhere ucontext serves.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(DE_SANITIZE)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace densenet_efficient::emulation {

#if defined(__x86_64__)
struct Context {
  void* stack_pointer = nullptr;
};

// Saves the callee-saved registers on the current stack, which it leaves in *from, and restores
// those that lie on the stack `to`.
__attribute__((naked, noinline)) inline void switch_stack(void** /*from*/, void* /*to*/) {
  asm volatile(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}

inline void prepare(Context& context, char* stack, size_t size, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + size);
  *--top = nullptr;  // keeps the stack 16-byte aligned at the entry, and ends backtraces
  *--top = reinterpret_cast<void*>(entry);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  context.stack_pointer = top;
}

inline void switch_context(Context& from, Context& to) {
  switch_stack(&from.stack_pointer, to.stack_pointer);
}
#else
struct Context {
  ucontext_t context;
};

inline void prepare(Context& context, char* stack, size_t size, void (*entry)()) {
  getcontext(&context.context);
  context.context.uc_stack.ss_sp = stack;
  context.context.uc_stack.ss_size = size;
  context.context.uc_link = nullptr;
  makecontext(&context.context, entry, 0);
}

inline void switch_context(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
#endif

// Stacks of equal size, each below an inaccessible page, mapped once and used again.
class Stacks {
 public:
  static constexpr size_t kSize = 256 * 1024, kGuard = 4096;

  explicit Stacks(int count) : count_(count) {
    memory_ = static_cast<char*>(mmap(nullptr, count * kSize, PROT_READ | PROT_WRITE,
                                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (memory_ == MAP_FAILED) throw std::runtime_error("emulation: no memory for stacks");
    for (int i = 0; i < count; ++i) mprotect(memory_ + i * kSize, kGuard, PROT_NONE);
  }
  ~Stacks() {
    forget();
    munmap(memory_, count_ * kSize);
  }
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;

  int count() const { return count_; }
  char* stack(int i) { return memory_ + i * kSize + kGuard; }
  static constexpr size_t size() { return kSize - kGuard; }

  // Fibers that were left in the middle leave poisoned stack frames.
  void forget() {
#if defined(DE_SANITIZE)
    __asan_unpoison_memory_region(memory_, count_ * kSize);
#endif
  }

 private:
  int count_;
  char* memory_;
};

}  // namespace densenet_efficient::emulation
