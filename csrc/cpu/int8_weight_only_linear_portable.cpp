// Weight-only products in GCC vectors of 8 floats: a row of weight is dequantised into a thread's scratch and met by
// four rows of x at a time.
#include <algorithm>
#include <type_traits>

#include "float_types.h"
#include "int8_matmul_epilogue.h"
#include "int8_weight_only_linear_kernels.h"
#include "scratch.h"

namespace pykernels::cpu {
namespace {

typedef float Vector __attribute__((vector_size(32), aligned(4), may_alias));
constexpr int64_t kLanes = 8;
constexpr int64_t kRowsAtOnce = 4;
constexpr int64_t kWeightColumns = 16;

inline int64_t padded_columns(int64_t K) { return (K + kLanes - 1) / kLanes * kLanes; }

Int8MatmulPlan weight_plan(const Int8WeightOnly& args) {
  Int8MatmulPlan plan;
  plan.row_bytes = padded_columns(args.K) * 4;
  plan.row_items = args.M;
  plan.tile_items = (args.N + kWeightColumns - 1) / kWeightColumns;
  plan.workspace_bytes = args.M * plan.row_bytes;
  return plan;
}

template <class T>
void widen_row(const T* x, int64_t K, float* row) {
  for (int64_t k = 0; k < K; ++k) row[k] = to_float(x[k]);
}

void weight_rows(const Int8WeightOnly& args, const Int8MatmulPlan& plan, char* workspace, int64_t begin, int64_t end) {
  for (int64_t m = begin; m < end; ++m) {
    float* row = reinterpret_cast<float*>(workspace + m * plan.row_bytes);
    const int64_t offset = m * args.x_stride;
    if (args.x_dtype == DType::f32) widen_row(static_cast<const float*>(args.x) + offset, args.K, row);
    if (args.x_dtype == DType::f16) widen_row(static_cast<const f16*>(args.x) + offset, args.K, row);
    if (args.x_dtype == DType::bf16) widen_row(static_cast<const bf16*>(args.x) + offset, args.K, row);
    std::fill(row + args.K, row + padded_columns(args.K), 0.0f);
  }
}

void dequantize_row(const Int8WeightOnly& args, int64_t n, float* row) {
  const int8_t* codes = args.weight + n * args.weight_stride;
  const int64_t size = args.K / args.groups;
  for (int64_t g = 0; g < args.groups; ++g) {
    const float scale = args.group_scale != nullptr ? args.group_scale[n * args.groups + g] : 1.0f;
    for (int64_t k = g * size; k < (g + 1) * size; ++k) row[k] = static_cast<float>(codes[k]) * scale;
  }
  std::fill(row + args.K, row + padded_columns(args.K), 0.0f);
}

template <int R>
void products_of(const float* x, int64_t x_stride, const float* w, int64_t K, float* out) {
  Vector acc[R][2] = {};
  int64_t k = 0;
  for (; k + 2 * kLanes <= K; k += 2 * kLanes)
    for (int i = 0; i < R; ++i)
      for (int u = 0; u < 2; ++u)
        acc[i][u] += *reinterpret_cast<const Vector*>(w + k + u * kLanes) *
                     *reinterpret_cast<const Vector*>(x + i * x_stride + k + u * kLanes);
  if (k < K)
    for (int i = 0; i < R; ++i)
      acc[i][0] += *reinterpret_cast<const Vector*>(w + k) * *reinterpret_cast<const Vector*>(x + i * x_stride + k);
  for (int i = 0; i < R; ++i) {
    const Vector sum = acc[i][0] + acc[i][1];
    out[i] = ((sum[0] + sum[4]) + (sum[1] + sum[5])) + ((sum[2] + sum[6]) + (sum[3] + sum[7]));
  }
}

void weight_tiles(const Int8WeightOnly& args, const Int8MatmulPlan& plan, char* workspace, int64_t begin, int64_t end) {
  static thread_local Scratch scratch;
  const int64_t K = padded_columns(args.K);
  float* w = reinterpret_cast<float*>(scratch.get((K + kWeightColumns * args.M) * 4));
  float* products = w + K;  // [M][kWeightColumns]
  const float* x = reinterpret_cast<const float*>(workspace);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t n0 = item * kWeightColumns, columns = std::min(kWeightColumns, args.N - n0);
    for (int64_t j = 0; j < columns; ++j) {
      dequantize_row(args, n0 + j, w);
      float out[kRowsAtOnce];
      for (int64_t m = 0; m < args.M; m += kRowsAtOnce) {
        const int64_t rows = std::min(kRowsAtOnce, args.M - m);
        if (rows == kRowsAtOnce) {
          products_of<kRowsAtOnce>(x + m * K, K, w, K, out);
        } else {
          for (int64_t i = 0; i < rows; ++i) products_of<1>(x + (m + i) * K, K, w, K, out + i);
        }
        for (int64_t i = 0; i < rows; ++i) products[(m + i) * kWeightColumns + j] = out[i];
      }
    }
    epilogue(args.epilogue, products, kWeightColumns, 0, args.M, n0, columns);
  }
  (void)plan;
}

}  // namespace

const Int8WeightOnlyKernels kInt8WeightOnlyPortable = {weight_plan, weight_rows, weight_tiles};

}  // namespace pykernels::cpu
