// The types every launcher shares, and the functions of the INT8 operations; launchers/<op>.h holds the others.
// Raw pointers, sizes, strides in elements, and a range or a stream. No torch header is included here or below.
#pragma once

#include <cstdint>

namespace pykernels {

enum class DType : int { f32 = 0, f16 = 1, bf16 = 2, i8 = 3, i32 = 4, f64 = 5 };

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

// --- quantize_colwise, quantize_both ------------------------------------------------------------------------------
// Two reads: absmax of rows and columns, then codes. Between them the caller turns absmax into scales and inverses.
// Absmax values travel as the bit patterns of non-negative floats, which order as integers.
struct QuantizeColwise {
  const void* x = nullptr;
  DType x_dtype = DType::f32;
  int64_t x_stride = 0;  // between rows; 1 within a row
  int64_t K = 0;
  const float* inv = nullptr;  // [K], padded; 0 where all codes of the column are 0
  bool stochastic = false;
  uint64_t seed = 0;
  int8_t* q = nullptr;  // [M, K]
};

struct QuantizeBoth {
  const void* x = nullptr;
  DType x_dtype = DType::f32;
  int64_t x_stride = 0;
  int64_t M = 0;
  int64_t K = 0;
  const float* row_inv = nullptr;  // [M]
  const float* col_inv = nullptr;  // [K], padded
  bool stochastic = false;
  uint64_t seed = 0;
  int8_t* q = nullptr;   // [M, K], by rows
  int8_t* qt = nullptr;  // [K, M], by columns, transposed
};

// Arrays "padded" have room for a multiple of this many elements.
inline constexpr int64_t kColumnPadding = 16;

namespace cpu {
// Raises absmax[0 .. K), padded, to that of rows [begin, end); row_absmax, where given, is indexed by the row.
void absmax_columns(const QuantizeColwise& args, int64_t begin, int64_t end, uint32_t* absmax, uint32_t* row_absmax);
// scale and inv of n absmax values.
void scales_of_absmax(const uint32_t* absmax, int64_t n, float* scale, float* inv);
void quantize_colwise(const QuantizeColwise& args, int64_t begin, int64_t end);  // rows [begin, end)
void quantize_both(const QuantizeBoth& args, int64_t begin, int64_t end);        // rows [begin, end)
}  // namespace cpu

// --- quantize_blockwise -------------------------------------------------------------------------------------------
// Tiles of block_rows x block_cols; the last of each direction may be ragged. scale is [ceil(M / rows), ceil(K /
// cols)].
struct QuantizeBlockwise {
  const void* x = nullptr;
  DType x_dtype = DType::f32;
  int64_t x_stride = 0;
  int64_t M = 0;
  int64_t K = 0;
  int64_t block_rows = 1;
  int64_t block_cols = 1;
  int8_t* q = nullptr;  // [M, K]
  float* scale = nullptr;
};

namespace cpu {
void quantize_blockwise(const QuantizeBlockwise& args, int64_t begin, int64_t end);  // rows of blocks [begin, end)
}

// --- quantize_asymmetric ------------------------------------------------------------------------------------------
// x ~ (q - zero_point) * scale, the range of each row widened to hold 0.
struct QuantizeAsymmetric {
  const void* x = nullptr;
  DType x_dtype = DType::f32;
  int64_t x_stride = 0;
  int64_t K = 0;
  int8_t* q = nullptr;            // [M, K]
  float* scale = nullptr;         // [M]
  int32_t* zero_point = nullptr;  // [M]
};

namespace cpu {
void quantize_asymmetric(const QuantizeAsymmetric& args, int64_t begin, int64_t end);  // rows [begin, end)
}

// --- dequantize ---------------------------------------------------------------------------------------------------
// out = float(q - zero_point) * scale, with one scale for each tile of block_rows x block_cols, in the order of the
// grid.
struct Dequantize {
  const int8_t* q = nullptr;
  int64_t q_stride = 0;
  int64_t K = 0;
  int64_t block_rows = 1;
  int64_t block_cols = 1;
  const float* scale = nullptr;
  const int32_t* zero_point = nullptr;  // null: 0
  void* out = nullptr;                  // [M, K]
  DType out_dtype = DType::f32;
  bool stream = false;  // write past the caches; rows then are whole lines of 64 bytes
};

namespace cpu {
void dequantize(const Dequantize& args, int64_t begin, int64_t end);  // rows [begin, end)
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
  bool streaming = false;  // few rows: b is read in place, not packed
  int64_t rows_per_item = 1;
  int64_t columns_per_item = 1;
  int64_t row_items = 0;
  int64_t tile_items = 0;
  int64_t row_bytes = 0;  // of one prepared row
  int64_t workspace_bytes = 0;
};

namespace cpu {
// Rows of `a` that fit one workspace of a few megabytes; a larger product is run in blocks of that many rows.
int64_t int8_matmul_block_rows(int64_t K);
Int8MatmulPlan plan_int8_matmul(const Int8Matmul& args);
// workspace: aligned to 64 bytes, the same for both stages.
void int8_matmul_rows(const Int8Matmul& args, const Int8MatmulPlan& plan, char* workspace, int64_t begin, int64_t end);
void int8_matmul_tiles(const Int8Matmul& args, const Int8MatmulPlan& plan, char* workspace, int64_t begin, int64_t end);
}  // namespace cpu

// int8_weight_only_linear: out[m, n] = epilogue(sum over k of x[m, k] * weight[n, k] * scale of n's group of k).
// One scale for each row of weight goes through epilogue.b_scale, and group_scale is null.
struct Int8WeightOnly {
  const void* x = nullptr;
  DType x_dtype = DType::f32;
  int64_t x_stride = 0;
  const int8_t* weight = nullptr;
  int64_t weight_stride = 0;
  const float* group_scale = nullptr;  // [N, groups], contiguous
  int64_t groups = 1;
  int64_t M = 0;
  int64_t N = 0;
  int64_t K = 0;
  Epilogue epilogue;
};

namespace cpu {
int64_t int8_weight_only_block_rows(int64_t K);
Int8MatmulPlan plan_int8_weight_only(const Int8WeightOnly& args);
void int8_weight_only_rows(const Int8WeightOnly& args, const Int8MatmulPlan& plan, char* workspace, int64_t begin,
                           int64_t end);
void int8_weight_only_tiles(const Int8WeightOnly& args, const Int8MatmulPlan& plan, char* workspace, int64_t begin,
                            int64_t end);
}  // namespace cpu

}  // namespace pykernels
