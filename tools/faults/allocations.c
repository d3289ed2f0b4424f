/* An allocator that fails when it is told to, loaded in front of the C library's (LD_PRELOAD).
 *
 * PyTorch's CPU allocator, in libc10, takes all memory of tensors from posix_memalign. So does oneDNN
 * for small objects of its own, whose absence it does not survive: those are left alone. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <link.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

static uintptr_t begin, end; /* of libc10 in memory */
static long seen = -1;       /* allocations since faults_arm; -1: not armed */
static long failing;

static int find(struct dl_phdr_info *info, size_t size, void *data) {
  if (strstr(info->dlpi_name, "/libc10.so") == NULL) return 0;
  begin = info->dlpi_addr;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const ElfW(Phdr) *part = &info->dlpi_phdr[i];
    const uintptr_t last = begin + part->p_vaddr + part->p_memsz;
    if (part->p_type == PT_LOAD && last > end) end = last;
  }
  return 1;
}

void faults_arm(long number) {
  if (end == 0) dl_iterate_phdr(find, NULL);
  failing = number;
  seen = 0;
}

long faults_disarm(void) {
  const long count = seen;
  seen = -1;
  return count;
}

int posix_memalign(void **memory, size_t alignment, size_t size) {
  static int (*real)(void **, size_t, size_t);
  if (real == NULL) *(void **)&real = dlsym(RTLD_NEXT, "posix_memalign");
  const uintptr_t caller = (uintptr_t)__builtin_return_address(0);
  if (seen >= 0 && caller >= begin && caller < end && seen++ == failing) return ENOMEM;
  return real(memory, alignment, size);
}
