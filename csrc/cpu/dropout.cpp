// The launcher: picks the table of the instruction set in force and the entry of the dtype.
#include "dropout_kernels.h"
#include "isa.h"

namespace pykernels::cpu {
namespace {

const DropoutKernels& kernels() {
#if defined(__x86_64__)
  switch (isa()) {
    case Isa::avx512_vnni:
      return kDropoutAvx512;
    case Isa::avx2:
      return kDropoutAvx2;
    case Isa::portable:
      break;
  }
#endif
  return kDropoutPortable;
}

}  // namespace

void dropout(const Dropout& args, int64_t begin, int64_t end) {
  const DropoutKernels& table = kernels();
  (args.out_dtype == args.x_dtype ? table.same : table.wide)[static_cast<int>(args.x_dtype)](args, begin, end);
}

}  // namespace pykernels::cpu
