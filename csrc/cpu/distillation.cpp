// The launcher: picks the table of the instruction set in force and the entry of the dtypes.
#include "distillation_kernels.h"
#include "isa.h"

namespace pykernels::cpu {
namespace {

const DistillationKernels& kernels() {
#if defined(__x86_64__)
  switch (isa()) {
    case Isa::avx512_vnni:
      return kDistillationAvx512;
    case Isa::avx2:
      return kDistillationAvx2;
    case Isa::portable:
      break;
  }
#endif
  return kDistillationPortable;
}

}  // namespace

void distillation_rows(const DistillationRows& args, int64_t begin, int64_t end) {
  kernels().rows[static_cast<int>(args.student_dtype)][static_cast<int>(args.teacher_dtype)](args, begin, end);
}

}  // namespace pykernels::cpu
