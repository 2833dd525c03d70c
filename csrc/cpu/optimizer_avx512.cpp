#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "float_types.h"
#include "optimizer_kernels.h"
#include "philox.h"

// As in quantize_avx2.cpp: no header of others below this line.
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#include "optimizer_table.h"
#include "simd_codes_avx512.h"

namespace pykernels::cpu {

const OptimizerKernels kOptimizerAvx512 = optimizer_kernels<Avx512Codes>();

}  // namespace pykernels::cpu
#endif
