// The two shapes of the AVX2 product: packed panels for many rows, rows of b streamed in place for few.
#pragma once

#include "int8_matmul_kernels.h"

namespace pykernels::cpu::avx2 {

constexpr int kTileRows = 4;
constexpr int kTileColumns = 16;
constexpr int kMostStreamed = 4;  // rows

void panel_rows(const Int8Matmul& args, const Int8MatmulPlan& plan, char* workspace, int64_t begin, int64_t end);
void panel_tiles(const Int8Matmul& args, const Int8MatmulPlan& plan, char* workspace, int64_t begin, int64_t end);

void streaming_rows(const Int8Matmul& args, const Int8MatmulPlan& plan, char* workspace, int64_t begin, int64_t end);
void streaming_tiles(const Int8Matmul& args, const Int8MatmulPlan& plan, char* workspace, int64_t begin, int64_t end);

}  // namespace pykernels::cpu::avx2
