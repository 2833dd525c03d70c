// Any machine: rows of codes, plain dot products.
#include <algorithm>
#include <type_traits>

#include "float_types.h"
#include "int8_matmul_epilogue.h"
#include "int8_matmul_kernels.h"

namespace pykernels::cpu {
namespace {

constexpr int64_t kColumns = 16;

Int8MatmulPlan plan(const Int8Matmul& args) {
  Int8MatmulPlan plan;
  plan.row_bytes = args.K;
  plan.rows_per_item = args.M;
  plan.columns_per_item = kColumns;
  plan.row_items = args.a_dtype == DType::i8 ? 0 : args.M;
  plan.tile_items = (args.N + kColumns - 1) / kColumns;
  plan.workspace_bytes = Int8Workspace::bytes(args.M, plan.row_bytes);
  return plan;
}

void rows(const Int8Matmul& args, const Int8MatmulPlan& plan, char* workspace, int64_t begin, int64_t end) {
  const Int8Workspace to(workspace, args.M, plan.row_bytes);
  int8_matmul_codes(args, begin, end - begin, to.rows + begin * plan.row_bytes, plan.row_bytes, to.scale);
}

int32_t product(const int8_t* a, const int8_t* b, int64_t K) {
  int32_t sum = 0;
  for (int64_t k = 0; k < K; ++k) sum += static_cast<int16_t>(a[k]) * static_cast<int16_t>(b[k]);
  return sum;
}

void tiles(const Int8Matmul& args, const Int8MatmulPlan& plan, char* workspace, int64_t begin, int64_t end) {
  const Int8Workspace from(workspace, args.M, plan.row_bytes);
  const Epilogue epilogue = int8_matmul_epilogue(args, from);
  const bool direct = args.a_dtype == DType::i8;
  const int8_t* a = direct ? static_cast<const int8_t*>(args.a) : from.rows;
  const int64_t a_stride = direct ? args.a_stride : plan.row_bytes;
  int32_t products[kColumns];
  for (int64_t n0 = begin * kColumns; n0 < std::min(args.N, end * kColumns); n0 += kColumns) {
    const int64_t columns = std::min(kColumns, args.N - n0);
    for (int64_t m = 0; m < args.M; ++m) {
      for (int64_t j = 0; j < columns; ++j)
        products[j] = product(a + m * a_stride, args.b + (n0 + j) * args.b_stride, args.K);
      epilogue_int32(epilogue, products, kColumns, m, 1, n0, columns);
    }
  }
}

}  // namespace

const Int8MatmulKernels kInt8MatmulPortable = {plan, rows, tiles};

}  // namespace pykernels::cpu
