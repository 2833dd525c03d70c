// The launchers: pick the table of the instruction set in force and the entry of the dtype.
#include "isa.h"
#include "quantize_kernels.h"

namespace pykernels::cpu {
namespace {

const QuantizeKernels& kernels() {
#if defined(__x86_64__)
  switch (isa()) {
    case Isa::avx512_vnni:
      return kQuantizeAvx512;
    case Isa::avx2:
      return kQuantizeAvx2;
    case Isa::portable:
      break;
  }
#endif
  return kQuantizePortable;
}

}  // namespace

void quantize_rowwise(const QuantizeRowwise& args, int64_t begin, int64_t end) {
  kernels().rowwise[static_cast<int>(args.x_dtype)](args, begin, end);
}

}  // namespace pykernels::cpu
