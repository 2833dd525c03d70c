// int8_block_scaled_matmul: out[m, n] = epilogue(sum over blocks of K of (the block's int32 sum) * a_scale[m, block] *
// b_scale[n / 128, block]), added up in float32. Both operands have stride 1 along k.
#pragma once

#include "../launchers.h"

namespace pykernels {

inline constexpr int64_t kScaledBlock = 128;

struct Int8BlockScaled {
  const int8_t* a = nullptr;
  int64_t a_stride = 0;
  const float* a_scale = nullptr;  // [M, blocks], contiguous
  const int8_t* b = nullptr;
  int64_t b_stride = 0;
  const float* b_scale = nullptr;  // [ceil(N / 128), blocks], contiguous
  int64_t blocks = 0;              // ceil(K / 128)
  int64_t M = 0;
  int64_t N = 0;
  int64_t K = 0;
  Epilogue epilogue;  // bias and out
};

namespace cpu {
// As for int8_matmul: first every row item, then every tile item, in blocks of int8_matmul_block_rows(K) rows.
Int8MatmulPlan plan_int8_block_scaled(const Int8BlockScaled& args);
void int8_block_scaled_rows(const Int8BlockScaled& args, const Int8MatmulPlan& plan, char* workspace, int64_t begin,
                            int64_t end);
void int8_block_scaled_tiles(const Int8BlockScaled& args, const Int8MatmulPlan& plan, char* workspace, int64_t begin,
                             int64_t end);
}  // namespace cpu

}  // namespace pykernels
