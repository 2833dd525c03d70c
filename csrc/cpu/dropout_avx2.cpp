#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "dropout_kernels.h"
#include "float_types.h"
#include "philox.h"

// As in quantize_avx2.cpp: no header of others below this line.
#pragma GCC target("avx2,fma,f16c")
#include "dropout.h"
#include "simd_random_avx2.h"

namespace pykernels::cpu {

const DropoutKernels kDropoutAvx2 = dropout_kernels<Avx2Random>();

}  // namespace pykernels::cpu
#endif
