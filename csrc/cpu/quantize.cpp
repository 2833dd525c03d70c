// The launchers: pick the table of the instruction set in force and the entry of the dtype.
#include "isa.h"
#include "quantize_kernels.h"
#include "quantize_span.h"
#include "scratch.h"

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

void absmax_columns(const QuantizeColwise& args, int64_t begin, int64_t end, uint32_t* absmax, uint32_t* row_absmax) {
  kernels().absmax[static_cast<int>(args.x_dtype)](args, begin, end, absmax, row_absmax);
}

void scales_of_absmax(const uint32_t* absmax, int64_t n, float* scale, float* inv) {
  for (int64_t j = 0; j < n; ++j) {
    const Scale s = scale_of_absmax(absmax[j]);
    scale[j] = s.scale;
    inv[j] = s.inv;
  }
}

void quantize_colwise(const QuantizeColwise& args, int64_t begin, int64_t end) {
  kernels().colwise[static_cast<int>(args.x_dtype)](args, begin, end);
}

void quantize_both(const QuantizeBoth& args, int64_t begin, int64_t end) {
  kernels().both[static_cast<int>(args.x_dtype)](args, begin, end);
}

void quantize_blockwise(const QuantizeBlockwise& args, int64_t begin, int64_t end) {
  kernels().blockwise[static_cast<int>(args.x_dtype)](args, begin, end);
}

void quantize_asymmetric(const QuantizeAsymmetric& args, int64_t begin, int64_t end) {
  kernels().asymmetric[static_cast<int>(args.x_dtype)](args, begin, end);
}

void dequantize(const Dequantize& args, int64_t begin, int64_t end) {
  thread_local Scratch scratch;
  void* row = args.stream ? scratch.get(args.K * static_cast<int64_t>(sizeof(float))) : nullptr;
  kernels().dequantize[static_cast<int>(args.out_dtype)](args, begin, end, row);
}

}  // namespace pykernels::cpu
