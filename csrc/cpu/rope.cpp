// The launcher: picks the table of the instruction set in force and the entry of the dtype.
#include "isa.h"
#include "rope_kernels.h"
#include "scratch.h"

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
  static thread_local Scratch scratch;
  const int64_t floats = (2 * kRopeTile + 2) * rope_line(args.pairs) + args.D;
  float* tables = reinterpret_cast<float*>(scratch.get(floats * static_cast<int64_t>(sizeof(float))));
  kernels().rotate[static_cast<int>(args.dtype)](args, begin, end, tables);
}

}  // namespace pykernels::cpu
