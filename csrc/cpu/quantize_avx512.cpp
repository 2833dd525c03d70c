#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "float_types.h"
#include "philox.h"
#include "quantize_kernels.h"

// As in quantize_avx2.cpp: no header of others below this line.
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#include "quantize_table.h"
#include "simd_random_avx512.h"

namespace pykernels::cpu {

const QuantizeKernels kQuantizeAvx512 = quantize_kernels<Avx512Random>();

}  // namespace pykernels::cpu
#endif
