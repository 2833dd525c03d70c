#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "cross_entropy_kernels.h"
#include "float_types.h"
#include "simd_math.h"
#include "simd_portable.h"

// The bodies use both.
#include "cross_entropy_table.h"

namespace pykernels::cpu {

const CrossEntropyKernels kCrossEntropyPortable = cross_entropy_kernels<Portable>();

}  // namespace pykernels::cpu
