// A row that lies in the cache, to memory past the caches. S is one of the structs of simd_*.h.
#pragma once

#include <cstdint>

namespace pykernels::cpu {
namespace {

// Both on lines of 64 bytes, and bytes a multiple of that. S::fence() orders what follows.
template <class S>
void stream_row(const void* from, void* to, int64_t bytes) {
  for (int64_t byte = 0; byte < bytes; byte += 64)
    S::stream_line(static_cast<int8_t*>(to) + byte, static_cast<const int8_t*>(from) + byte);
}

}  // namespace
}  // namespace pykernels::cpu
