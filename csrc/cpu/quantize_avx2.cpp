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

// Headers that are not templates of ours stand above: an inline function of theirs, compiled for AVX2, could be the
// copy that the linker keeps for everybody.
#pragma GCC target("avx2,fma,f16c")
#include "quantize_table.h"
#include "simd_random_avx2.h"

namespace pykernels::cpu {

const QuantizeKernels kQuantizeAvx2 = quantize_kernels<Avx2Random>();

}  // namespace pykernels::cpu
#endif
