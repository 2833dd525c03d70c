// The launchers as C functions for ctypes, and the emulator's switches.
#include "csrc/cuda/common.cuh"
#include "csrc/cuda/int8_block_scaled_matmul.h"
#include "csrc/cuda/int8_grouped_matmul.h"

using namespace pykernels::cuda;

extern "C" {

void emulator_configure(int deferred_copies, uint32_t seed, int multiprocessors) {
  emulator::deferred_copies = deferred_copies != 0;
  emulator::schedule_seed = seed;
  emulator::multiprocessors = multiprocessors;
}

const char* emulated_quantize_rowwise(const pykernels::QuantizeRowwise* p, int64_t rows) {
  return quantize_rowwise(*p, rows, nullptr);
}
const char* emulated_int8_matmul(const Int8Matmul* p) { return int8_matmul(*p, nullptr); }
const char* emulated_int8_matmul_tiled(const Int8Matmul* p) { return int8_matmul_tiled(*p, nullptr); }
const char* emulated_int8_weight_only_linear(const Int8WeightOnlyLinear* p) {
  return int8_weight_only_linear(*p, nullptr);
}
const char* emulated_int8_grouped_matmul(const Int8GroupedMatmul* p) { return int8_grouped_matmul(*p, nullptr); }
const char* emulated_int8_block_scaled_matmul(const pykernels::Int8BlockScaled* p) {
  return int8_block_scaled_matmul(*p, nullptr);
}
const char* emulated_int8_row_sum(const int8_t* b, int64_t stride, int64_t n, int64_t k, int32_t* out) {
  return int8_row_sum(b, stride, n, k, out, nullptr);
}
}
