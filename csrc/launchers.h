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

// int8_matmul and int8_linear: out[m, n] = epilogue(sum over k of a[m, k] * b[n, k]), both with stride 1 along k.
// `a` is int8, or a float type that is quantised row by row on the way (epilogue.a_scale is then ignored).
struct Int8Matmul {
  const void* a = nullptr;
  DType a_dtype = DType::i8;
  int64_t a_stride = 0;
  const float* a_given_scale = nullptr;  // static quantisation: one scale; null: dynamic
  const int8_t* b = nullptr;
  int64_t b_stride = 0;
  int64_t M = 0;
  int64_t N = 0;
  int64_t K = 0;
  Epilogue epilogue;
};

// How a product is cut. First every row item, then every tile item; the items of a stage are independent.
struct Int8MatmulPlan {
  bool streaming = false;    // few rows: b is read in place, not packed
  int64_t rows_per_item = 1;
  int64_t columns_per_item = 1;
  int64_t row_items = 0;
  int64_t tile_items = 0;
  int64_t row_bytes = 0;     // of one prepared row
  int64_t workspace_bytes = 0;
};

namespace cpu {
// Rows of `a` that fit one workspace of a few megabytes; a larger product is run in blocks of that many rows.
int64_t int8_matmul_block_rows(int64_t K);
Int8MatmulPlan plan_int8_matmul(const Int8Matmul& args);
// workspace: aligned to 64 bytes, the same for both stages.
void int8_matmul_rows(const Int8Matmul& args, const Int8MatmulPlan& plan, char* workspace, int64_t begin, int64_t end);
void int8_matmul_tiles(const Int8Matmul& args, const Int8MatmulPlan& plan, char* workspace, int64_t begin,
                       int64_t end);
}  // namespace cpu

}  // namespace pykernels
