#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "simd_codes_portable.h"
// The struct comes first: its functions are found by name in the templates.
#include "optimizer_table.h"

namespace pykernels::cpu {

const OptimizerKernels kOptimizerPortable = optimizer_kernels<PortableCodes>();

}  // namespace pykernels::cpu
