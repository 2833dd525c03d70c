#include <cstdint>
#include <cstring>

#include "rope.h"
#include "simd_portable.h"

namespace pykernels::cpu {

const RopeKernels kRopePortable = rope_kernels<Portable>();

}  // namespace pykernels::cpu
