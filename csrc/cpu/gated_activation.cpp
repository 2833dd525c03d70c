// The launchers: pick the table of the instruction set in force and the entry of the activation and dtype.
#include "gated_activation_kernels.h"
#include "isa.h"
#include "scratch.h"

namespace pykernels::cpu {
namespace {

const GatedKernels::Entry& kernels(GatedActivation activation, DType dtype) {
  const auto entry = [&](const GatedKernels& table) -> const GatedKernels::Entry& {
    return table.entry[static_cast<int>(activation) - 1][static_cast<int>(dtype)];
  };
#if defined(__x86_64__)
  switch (isa()) {
    case Isa::avx512_vnni:
      return entry(kGatedAvx512);
    case Isa::avx2:
      return entry(kGatedAvx2);
    case Isa::portable:
      break;
  }
#endif
  return entry(kGatedPortable);
}

}  // namespace

void gated_activation(const GatedForward& args, int64_t begin, int64_t end) {
  kernels(args.activation, args.dtype).forward(args, begin, end);
}

void gated_activation_backward(const GatedBackward& args, int64_t begin, int64_t end) {
  kernels(args.activation, args.dtype).backward(args, begin, end);
}

void gated_activation_quantized(const GatedQuantized& args, int64_t begin, int64_t end) {
  thread_local Scratch scratch;
  char* row = scratch.get(args.forward.K * static_cast<int64_t>(sizeof(float)));
  kernels(args.forward.activation, args.forward.dtype).quantized(args, row, begin, end);
}

}  // namespace pykernels::cpu
