// The launchers: pick the table of the instruction set in force.
#include "int8_matmul_kernels.h"

#include <algorithm>

#include "isa.h"

namespace pykernels::cpu {
namespace {

constexpr int64_t kWorkspaceBytes = 4 << 20;

const Int8MatmulKernels& kernels() {
#if defined(__x86_64__)
  switch (isa()) {
    case Isa::avx512_vnni:
      return kInt8MatmulAvx512;
    case Isa::avx2:
      return kInt8MatmulAvx2;
    case Isa::portable:
      break;
  }
#endif
  return kInt8MatmulPortable;
}

}  // namespace

Int8Codes int8_matmul_codes(const Int8Matmul& args, int64_t m, int64_t count, int8_t* q, int64_t q_stride,
                            float* scale) {
  if (args.a_dtype == DType::i8) return {static_cast<const int8_t*>(args.a) + m * args.a_stride, args.a_stride};
  QuantizeRowwise quantize;
  quantize.x = args.a;
  quantize.x_dtype = args.a_dtype;
  quantize.x_stride = args.a_stride;
  quantize.K = args.K;
  quantize.given_scale = args.a_given_scale;
  quantize.q = q - m * q_stride;
  quantize.q_stride = q_stride;
  quantize.scale = scale;
  quantize_rowwise(quantize, m, m + count);
  return {q, q_stride};
}

Epilogue int8_matmul_epilogue(const Int8Matmul& args, const Int8Workspace& workspace) {
  Epilogue epilogue = args.epilogue;
  if (args.a_dtype != DType::i8) {
    epilogue.a_scale = workspace.scale;
    epilogue.a_scale_stride = 1;
  }
  return epilogue;
}

int64_t int8_matmul_block_rows(int64_t K) {
  return std::max<int64_t>(96, kWorkspaceBytes / std::max<int64_t>(K, 1) / 96 * 96);
}

Int8MatmulPlan plan_int8_matmul(const Int8Matmul& args) { return kernels().plan(args); }

void int8_matmul_rows(const Int8Matmul& args, const Int8MatmulPlan& plan, char* workspace, int64_t begin, int64_t end) {
  kernels().rows(args, plan, workspace, begin, end);
}

void int8_matmul_tiles(const Int8Matmul& args, const Int8MatmulPlan& plan, char* workspace, int64_t begin,
                       int64_t end) {
  kernels().tiles(args, plan, workspace, begin, end);
}

}  // namespace pykernels::cpu
