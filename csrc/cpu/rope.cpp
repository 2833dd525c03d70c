// The launcher: picks the table of the instruction set in force and the entry of the dtype.
#include <vector>

#include "isa.h"
#include "rope_kernels.h"

namespace pykernels::cpu {
namespace {

const RopeKernels& kernels() {
#if defined(__x86_64__)
  switch (isa()) {
    case Isa::avx512_vnni:
      return kRopeAvx512;
    case Isa::avx2:
      return kRopeAvx2;
    case Isa::portable:
      break;
  }
#endif
  return kRopePortable;
}

}  // namespace

void rope(const Rope& args, int64_t begin, int64_t end) {
  std::vector<float> scratch(kRopeTile * 4 * args.pairs);
  kernels().rotate[static_cast<int>(args.dtype)](args, begin, end, scratch.data());
}

}  // namespace pykernels::cpu
