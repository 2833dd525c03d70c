// The launchers of the norms: pick the table of the instruction set in force and the entry of the dtype.
#include <algorithm>

#include "isa.h"
#include "norm_kernels.h"
#include "scratch.h"

namespace pykernels::cpu {
namespace {

// Enough chunks for the threads of a large machine, and rows enough in each that their sums cost little to add up.
constexpr int64_t kChunks = 64;
constexpr int64_t kFewestRows = 16;

const NormKernels& kernels() {
#if defined(__x86_64__)
  switch (isa()) {
    case Isa::avx512_vnni:
      return kNormAvx512;
    case Isa::avx2:
      return kNormAvx2;
    case Isa::portable:
      break;
  }
#endif
  return kNormPortable;
}

float* lines(int64_t K) {
  static thread_local Scratch scratch;
  return reinterpret_cast<float*>(scratch.get(kNormLines * norm_line(K) * static_cast<int64_t>(sizeof(float))));
}

}  // namespace

void norm_forward(const NormForward& args, int64_t begin, int64_t end) {
  kernels().forward[static_cast<int>(args.dtype)](args, begin, end, lines(args.K));
}

int64_t norm_chunk_rows(int64_t M) {
  const int64_t rows = std::max(kFewestRows, (M + kChunks - 1) / kChunks);
  return (rows + 3) / 4 * 4;
}

void norm_backward(const NormBackward& args, int64_t begin, int64_t end) {
  kernels().backward[static_cast<int>(args.dtype)](args, begin, end, lines(args.K));
}

void norm_column_sums(const float* sums, int64_t chunks, int64_t K, DType out_dtype, void* out, int64_t begin,
                      int64_t end) {
  kernels().column_sums[static_cast<int>(out_dtype)](sums, chunks, K, out, begin, end);
}

}  // namespace pykernels::cpu
