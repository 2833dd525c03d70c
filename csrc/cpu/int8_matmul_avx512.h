// The two shapes of the AVX-512 product: packed panels for many rows, rows of b streamed in place for few.
#pragma once

#include "int8_matmul_kernels.h"

namespace pykernels::cpu::avx512 {

constexpr int kTileRows = 6;
constexpr int kPanelColumns = 64;

void panel_rows(const Int8Matmul& args, const Int8MatmulPlan& plan, char* workspace, int64_t begin, int64_t end);
void panel_tiles(const Int8Matmul& args, const Int8MatmulPlan& plan, char* workspace, int64_t begin, int64_t end);

void streaming_rows(const Int8Matmul& args, const Int8MatmulPlan& plan, char* workspace, int64_t begin, int64_t end);
void streaming_tiles(const Int8Matmul& args, const Int8MatmulPlan& plan, char* workspace, int64_t begin, int64_t end);

// Sum of count int8 at p; nothing past them is read.
int32_t row_sum(const int8_t* p, int64_t count);

}  // namespace pykernels::cpu::avx512
