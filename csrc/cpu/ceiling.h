// What the machine can do at most, for benchmarks to be measured against: each function works on one thread.
#pragma once

#include <cstdint>

namespace pykernels::cpu {

// Runs int8 multiply-accumulates from registers alone and returns how many operations (2 a product) that was.
int64_t ceiling_int8_avx512(int64_t iterations);
int64_t ceiling_int8_avx2(int64_t iterations);

// The same with fused float32 multiply-adds.
int64_t ceiling_float32_avx512(int64_t iterations);
int64_t ceiling_float32_avx2(int64_t iterations);

// Reads every byte once and returns a value that depends on all of them.
uint64_t ceiling_read_avx512(const void* data, int64_t bytes);
uint64_t ceiling_read_avx2(const void* data, int64_t bytes);

}  // namespace pykernels::cpu

extern "C" {
__attribute__((visibility("default"))) int64_t pykernels_ceiling_int8(int64_t iterations);
__attribute__((visibility("default"))) const char* pykernels_ceiling_int8_name();
__attribute__((visibility("default"))) int64_t pykernels_ceiling_float32(int64_t iterations);
__attribute__((visibility("default"))) const char* pykernels_ceiling_float32_name();
__attribute__((visibility("default"))) uint64_t pykernels_ceiling_read(const void* data, int64_t bytes);
// Reads some arrays and reads and writes others, side by side as an update does: a plain loop in the compiler's own
// instructions. Returns a value that depends on all of them.
__attribute__((visibility("default"))) uint64_t pykernels_ceiling_update(void* const* updated,
                                                                         const int64_t* updated_bytes, int64_t updates,
                                                                         const void* const* read,
                                                                         const int64_t* read_bytes, int64_t reads);
}
