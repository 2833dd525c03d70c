#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "cross_entropy_kernels.h"
#include "float_types.h"
#include "philox.h"

// As in quantize_avx2.cpp: no header of others below this line.
#pragma GCC target("avx2,fma,f16c")
#include "simd_avx2.h"
#include "simd_math.h"

// The bodies use both.
#include "cross_entropy_table.h"

namespace pykernels::cpu {

const CrossEntropyKernels kCrossEntropyAvx2 = cross_entropy_kernels<Avx2>();

}  // namespace pykernels::cpu
#endif
