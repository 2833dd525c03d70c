#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "float_types.h"
#include "philox.h"
#include "rope_kernels.h"

// As in quantize_avx2.cpp: no header of others below this line.
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#include "rope.h"
#include "simd_avx512.h"

namespace pykernels::cpu {

const RopeKernels kRopeAvx512 = rope_kernels<Avx512>();

}  // namespace pykernels::cpu
#endif
