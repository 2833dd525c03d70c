// The CUDA launchers, one section per operation. Device pointers; strides in elements; stream is a cudaStream_t.
// Each returns null when its launches were accepted, else CUDA's reason. An empty output is the caller's to skip.
#pragma once

#include <cstdint>

#include "../launchers.h"

namespace pykernels::cuda {

// quantize_rowwise: all `rows` rows of args (whose struct the CPU shares).
const char* quantize_rowwise(const QuantizeRowwise& args, int64_t rows, void* stream);

// int8_matmul: a [m, k] by b [n, k], both with stride 1 along k; what is done to the int32 sums is the epilogue's.
struct Int8Matmul {
  const int8_t* a = nullptr;
  int64_t a_stride = 0;
  const int8_t* b = nullptr;
  int64_t b_stride = 0;
  int64_t m = 0;
  int64_t n = 0;
  int64_t k = 0;
  Epilogue epilogue;
};
const char* int8_matmul(const Int8Matmul& p, void* stream);
const char* int8_matmul_small_m(const Int8Matmul& p, void* stream);  // reads b once for every 16 rows of a
const char* int8_matmul_tiled(const Int8Matmul& p, void* stream);

// b_sum[n] = sum of row n of b, which a zero point of a needs.
const char* int8_row_sum(const int8_t* b, int64_t b_stride, int64_t n, int64_t k, int32_t* b_sum, void* stream);

// int8_weight_only_linear: x [m, k] by weight [n, k], both contiguous; weight_scale [n, k / group_size].
struct Int8WeightOnlyLinear {
  const void* x = nullptr;
  DType x_dtype = DType::f32;
  const int8_t* weight = nullptr;
  const float* weight_scale = nullptr;
  int64_t group_size = 0;
  int64_t m = 0;
  int64_t n = 0;
  int64_t k = 0;
  Epilogue epilogue;  // bias, activation and out; weight_scale above is applied before it
};
const char* int8_weight_only_linear(const Int8WeightOnlyLinear& p, void* stream);
// For many rows: half or bfloat16 x, k a multiple of 16, pointers on 16 bytes, group_size k or a multiple of 64.
const char* int8_weight_only_linear_tiled(const Int8WeightOnlyLinear& p, void* stream);

}  // namespace pykernels::cuda
