#if defined(__x86_64__)
#include <algorithm>
#include <type_traits>

#include "float_types.h"
#include "int8_weight_only_linear_kernels.h"
#include "scratch.h"

#pragma GCC target("avx2,fma,f16c")
#include "int8_matmul_epilogue.h"
#include "int8_weight_only_linear_rows.h"

namespace pykernels::cpu {

const Int8WeightOnlyKernels kInt8WeightOnlyAvx2 = {weight_plan, weight_rows, weight_tiles};

}  // namespace pykernels::cpu

#endif
