// The launchers: pick the table of the instruction set in force.
#include <algorithm>

#include "int8_weight_only_linear_kernels.h"
#include "isa.h"

namespace pykernels::cpu {
namespace {

constexpr int64_t kWorkspaceBytes = 8 << 20;

const Int8WeightOnlyKernels& kernels() {
#if defined(__x86_64__)
  switch (isa()) {
    case Isa::avx512_vnni:
      return kInt8WeightOnlyAvx512;
    case Isa::avx2:
      return kInt8WeightOnlyAvx2;
    case Isa::portable:
      break;
  }
#endif
  return kInt8WeightOnlyPortable;
}

}  // namespace

int64_t int8_weight_only_block_rows(int64_t K) {
  const int64_t row_bytes = std::max<int64_t>(K, 1) * static_cast<int64_t>(sizeof(float));
  return std::max<int64_t>(96, kWorkspaceBytes / row_bytes / 96 * 96);
}

Int8MatmulPlan plan_int8_weight_only(const Int8WeightOnly& args) { return kernels().plan(args); }

void int8_weight_only_rows(const Int8WeightOnly& args, const Int8MatmulPlan& plan, char* workspace, int64_t begin,
                           int64_t end) {
  kernels().rows(args, plan, workspace, begin, end);
}

void int8_weight_only_tiles(const Int8WeightOnly& args, const Int8MatmulPlan& plan, char* workspace, int64_t begin,
                            int64_t end) {
  kernels().tiles(args, plan, workspace, begin, end);
}

}  // namespace pykernels::cpu
