// The types every launcher shares, and one section of plain functions per operation.
// Raw pointers, sizes, strides in elements, and a range or a stream. No torch header is included here or below.
#pragma once

#include <cstdint>

namespace pykernels {

enum class DType : int { f32 = 0, f16 = 1, bf16 = 2, i8 = 3, i32 = 4 };

// The numbers are part of the operator schemas (pykernels/ops/_enums.py holds the names).
enum class Activation : int { none = 0, relu = 1, gelu = 2, gelu_tanh = 3, silu = 4 };

// out = activation((acc - a_zero_point[m] * b_sum[n]) * a_scale[m] * b_scale[n] + bias[n]) + residual[m, n], in float32.
// A null scale is 1, a stride of 0 is one value for the whole tensor. out of type i32 is the bare accumulator.
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

}  // namespace pykernels
