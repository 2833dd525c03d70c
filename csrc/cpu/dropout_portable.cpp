#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "dropout.h"
#include "simd_portable.h"

namespace pykernels::cpu {

const DropoutKernels kDropoutPortable = dropout_kernels<Portable>();

}  // namespace pykernels::cpu
