#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "float_types.h"
#include "gated_activation_kernels.h"
#include "philox.h"
#include "simd_portable.h"
// Templates over the struct above.
#include "gated_activation_rows.h"

namespace pykernels::cpu {

const GatedKernels kGatedPortable = gated_kernels<Portable>();

}  // namespace pykernels::cpu
