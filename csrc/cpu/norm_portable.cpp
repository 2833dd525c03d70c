#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "float_types.h"
#include "norm_kernels.h"
#include "norm_table.h"
#include "philox.h"
#include "simd_portable.h"

namespace pykernels::cpu {

const NormKernels kNormPortable = norm_kernels<Portable>();

}  // namespace pykernels::cpu
