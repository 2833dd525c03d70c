// Any machine: plain dot products, a block of K at a time.
#include <algorithm>
#include <type_traits>

#include "float_types.h"
#include "int8_block_scaled_kernels.h"
#include "int8_matmul_epilogue.h"

namespace pykernels::cpu {
namespace {

constexpr int64_t kColumns = 16;

Int8MatmulPlan plan(const Int8BlockScaled& args) {
  Int8MatmulPlan plan;
  plan.rows_per_item = args.M;
  plan.columns_per_item = kColumns;
  plan.tile_items = (args.N + kColumns - 1) / kColumns;
  return plan;
}

void rows(const Int8BlockScaled&, const Int8MatmulPlan&, char*, int64_t, int64_t) {}

void tiles(const Int8BlockScaled& args, const Int8MatmulPlan&, char*, int64_t begin, int64_t end) {
  float products[kColumns];
  for (int64_t n0 = begin * kColumns; n0 < std::min(args.N, end * kColumns); n0 += kColumns) {
    const int64_t columns = std::min(kColumns, args.N - n0);
    for (int64_t m = 0; m < args.M; ++m) {
      std::fill_n(products, columns, 0.0f);
      for (int64_t block = 0; block < args.blocks; ++block) {
        const float scale = block_scale(args, m, n0, block);
        const int64_t k0 = block * kScaledBlock, count = std::min(kScaledBlock, args.K - k0);
        for (int64_t j = 0; j < columns; ++j) {
          const int8_t *a = args.a + m * args.a_stride + k0, *b = args.b + (n0 + j) * args.b_stride + k0;
          int32_t sum = 0;
          for (int64_t k = 0; k < count; ++k) sum += static_cast<int16_t>(a[k]) * static_cast<int16_t>(b[k]);
          products[j] += static_cast<float>(sum) * scale;
        }
      }
      epilogue(args.epilogue, products, kColumns, m, 1, n0, columns);
    }
  }
}

}  // namespace

const Int8BlockScaledKernels kInt8BlockScaledPortable = {plan, rows, tiles};

}  // namespace pykernels::cpu
