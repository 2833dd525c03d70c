// The launchers: pick the table of the instruction set in force.
#include "int8_block_scaled_kernels.h"
#include "isa.h"

namespace pykernels::cpu {
namespace {

const Int8BlockScaledKernels& kernels() {
#if defined(__x86_64__)
  switch (isa()) {
    case Isa::avx512_vnni:
      return kInt8BlockScaledAvx512;
    case Isa::avx2:
      return kInt8BlockScaledAvx2;
    case Isa::portable:
      break;
  }
#endif
  return kInt8BlockScaledPortable;
}

}  // namespace

Int8MatmulPlan plan_int8_block_scaled(const Int8BlockScaled& args) { return kernels().plan(args); }

void int8_block_scaled_rows(const Int8BlockScaled& args, const Int8MatmulPlan& plan, char* workspace, int64_t begin,
                            int64_t end) {
  kernels().rows(args, plan, workspace, begin, end);
}

void int8_block_scaled_tiles(const Int8BlockScaled& args, const Int8MatmulPlan& plan, char* workspace, int64_t begin,
                             int64_t end) {
  kernels().tiles(args, plan, workspace, begin, end);
}

}  // namespace pykernels::cpu
