// The launchers: pick the table of the instruction set in force and the entry of the dtype and softcap.
#include "cross_entropy_kernels.h"
#include "isa.h"

namespace pykernels::cpu {
namespace {

const CrossEntropyKernels& kernels() {
#if defined(__x86_64__)
  switch (isa()) {
    case Isa::avx512_vnni:
      return kCrossEntropyAvx512;
    case Isa::avx2:
      return kCrossEntropyAvx2;
    case Isa::portable:
      break;
  }
#endif
  return kCrossEntropyPortable;
}

}  // namespace

void cross_entropy(const CrossEntropy& args, const CrossEntropyLosses& losses, int64_t begin, int64_t end) {
  kernels().losses[static_cast<int>(args.dtype)][args.softcap != 0.0f](args, losses, begin, end);
}

void cross_entropy_update(const CrossEntropy& args, float* state, int64_t begin, int64_t end) {
  kernels().update[static_cast<int>(args.dtype)][args.softcap != 0.0f](args, state, begin, end);
}

void cross_entropy_backward(const CrossEntropy& args, const CrossEntropyBackward& backward, int64_t begin,
                            int64_t end) {
  kernels().backward[static_cast<int>(args.dtype)][args.softcap != 0.0f](args, backward, begin, end);
}

}  // namespace pykernels::cpu
