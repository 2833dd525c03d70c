// The epilogue as the compiler vectorises it for AVX2.
#if defined(__x86_64__)
#include <algorithm>
#include <type_traits>

#include "float_types.h"
#include "int8_matmul_kernels.h"

#pragma GCC target("avx2,fma,f16c")
#include "int8_matmul_epilogue.h"

namespace pykernels::cpu {

const EpilogueFn<int32_t> kEpilogueAvx2 = epilogue_int32;
const EpilogueFn<float> kFloatEpilogueAvx2 = epilogue<float>;

}  // namespace pykernels::cpu

#endif
