// The types every launcher shares, and one section of plain functions per operation.
// Raw pointers, sizes, strides in elements, and a range or a stream. No torch header is included here or below.
#pragma once

#include <cstdint>

namespace pykernels {

enum class DType : int { f32 = 0, f16 = 1, bf16 = 2, i8 = 3, i32 = 4 };

// The numbers are part of the operator schemas (pykernels/ops/_enums.py holds the names).
enum class Activation : int { none = 0, relu = 1, gelu = 2, gelu_tanh = 3, silu = 4 };

// out = activation((acc - a_zero_point[m] * b_sum[n]) * a_scale[m] * b_scale[n] + bias[n]) + residual[m, n], in
// float32. A null scale is 1, a stride of 0 is one value for the whole tensor. out of type i32 is the bare accumulator.
struct Epilogue {
  const float* a_scale = nullptr;
  int64_t a_scale_stride = 0;
  const float* b_scale = nullptr;
  int64_t b_scale_stride = 0;
  const int32_t* a_zero_point = nullptr;
  int64_t a_zero_point_stride = 0;
  const int32_t* b_sum = nullptr;
  const void* bias = nullptr;
  DType bias_dtype = DType::f32;
  const void* residual = nullptr;
  int64_t residual_stride = 0;
  DType residual_dtype = DType::f32;
  Activation activation = Activation::none;
  void* out = nullptr;
  int64_t out_stride = 0;
  DType out_dtype = DType::f32;
};

// --- quantize_rowwise ---------------------------------------------------------------------------------------------
// Row m: scale[m] = absmax / 127 (or the given one) and q = round(x * 127 / absmax). Zero rows have scale 0, rows that
// hold NaN or infinity have scale NaN, and both have codes 0. x is f32, f16 or bf16.
struct QuantizeRowwise {
  const void* x = nullptr;
  DType x_dtype = DType::f32;
  int64_t x_stride = 0;  // between rows; 1 within a row
  int64_t K = 0;
  const float* given_scale = nullptr;  // null: dynamic
  int64_t given_scale_stride = 0;      // 0: one scale for the whole tensor
  bool stochastic = false;
  uint64_t seed = 0;
  int8_t* q = nullptr;
  int64_t q_stride = 0;
  float* scale = nullptr;  // [M], indexed by the row
};

namespace cpu {
void quantize_rowwise(const QuantizeRowwise& args, int64_t begin, int64_t end);  // rows [begin, end)
}

}  // namespace pykernels
