// Huge pages for large fresh memory: touching it by 4 KiB pages costs more than writing it, and streaming a weight from
// them waits for the page tables.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace pykernels::cpu {

constexpr int64_t kHugePage = 2 << 20;

// A hint for the whole huge pages inside [data, data + bytes); where the system refuses, nothing changes.
inline void advise_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__)
  const uintptr_t mask = static_cast<uintptr_t>(kHugePage) - 1;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + mask) & ~mask;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) & ~mask;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace pykernels::cpu
