#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "distillation_kernels.h"
#include "float_types.h"
#include "philox.h"
#include "simd_portable.h"

#include "distillation_rows.h"

namespace pykernels::cpu {

const DistillationKernels kDistillationPortable = distillation_kernels<Portable>();

}  // namespace pykernels::cpu
