#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "float_types.h"
#include "philox.h"
#include "quantize_kernels.h"
#include "quantize_table.h"
#include "simd_portable.h"

namespace pykernels::cpu {

const QuantizeKernels kQuantizePortable = quantize_kernels<Portable>();

}  // namespace pykernels::cpu
