// The table that each instruction set fills for int8_weight_only_linear.
#pragma once

#include "int8_matmul_kernels.h"

namespace pykernels::cpu {

struct Int8WeightOnlyKernels {
  Int8MatmulPlan (*plan)(const Int8WeightOnly& args);
  void (*rows)(const Int8WeightOnly& args, const Int8MatmulPlan& plan, char* workspace, int64_t begin, int64_t end);
  void (*tiles)(const Int8WeightOnly& args, const Int8MatmulPlan& plan, char* workspace, int64_t begin, int64_t end);
};

extern const Int8WeightOnlyKernels kInt8WeightOnlyPortable;
extern const Int8WeightOnlyKernels kInt8WeightOnlyAvx2;
extern const Int8WeightOnlyKernels kInt8WeightOnlyAvx512;

namespace avx512 {

void weight_streaming_rows(const Int8WeightOnly& args, const Int8MatmulPlan& plan, char* workspace, int64_t begin,
                           int64_t end);
void weight_streaming_tiles(const Int8WeightOnly& args, const Int8MatmulPlan& plan, char* workspace, int64_t begin,
                            int64_t end);

}  // namespace avx512

namespace avx2 {

constexpr int kMostStreamed = 12;  // rows

void weight_streaming_rows(const Int8WeightOnly& args, const Int8MatmulPlan& plan, char* workspace, int64_t begin,
                           int64_t end);
void weight_streaming_tiles(const Int8WeightOnly& args, const Int8MatmulPlan& plan, char* workspace, int64_t begin,
                            int64_t end);

}  // namespace avx2
}  // namespace pykernels::cpu
