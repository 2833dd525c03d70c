#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "float_types.h"
#include "philox.h"
#include "rope_kernels.h"

// As in quantize_avx2.cpp: no header of others below this line.
#pragma GCC target("avx2,fma,f16c")
#include "rope.h"
#include "simd_avx2.h"

namespace pykernels::cpu {

const RopeKernels kRopeAvx2 = rope_kernels<Avx2>();

}  // namespace pykernels::cpu
#endif
