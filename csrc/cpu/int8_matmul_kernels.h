// The table that each instruction set fills for int8_matmul, and the workspace its stages share.
#pragma once

#include "../launchers.h"

namespace pykernels::cpu {

struct Int8MatmulKernels {
  Int8MatmulPlan (*plan)(const Int8Matmul& args);
  void (*rows)(const Int8Matmul& args, const Int8MatmulPlan& plan, char* workspace, int64_t begin, int64_t end);
  void (*tiles)(const Int8Matmul& args, const Int8MatmulPlan& plan, char* workspace, int64_t begin, int64_t end);
};

extern const Int8MatmulKernels kInt8MatmulPortable;
extern const Int8MatmulKernels kInt8MatmulAvx2;
extern const Int8MatmulKernels kInt8MatmulAvx512;

// The workspace: M prepared rows, then their scales (when they are quantised here), then their sums.
struct Int8Workspace {
  int8_t* rows;
  float* scale;
  int32_t* sum;

  static int64_t padded(int64_t bytes) { return (bytes + 63) / 64 * 64; }
  static int64_t bytes(int64_t M, int64_t row_bytes) { return padded(M * row_bytes) + 2 * padded(M * 4); }

  Int8Workspace(char* base, int64_t M, int64_t row_bytes)
      : rows(reinterpret_cast<int8_t*>(base)),
        scale(reinterpret_cast<float*>(base + padded(M * row_bytes))),
        sum(reinterpret_cast<int32_t*>(base + padded(M * row_bytes) + padded(M * 4))) {}
};

struct Int8Codes {
  const int8_t* first;
  int64_t stride;
};

// Rows m .. m + count: a float `a` is quantised to q and scale[m] .., an int8 one is returned where it lies.
Int8Codes int8_matmul_codes(const Int8Matmul& args, int64_t m, int64_t count, int8_t* q, int64_t q_stride,
                            float* scale);

// The epilogue with the scales of rows that were quantised here.
Epilogue int8_matmul_epilogue(const Int8Matmul& args, const Int8Workspace& workspace);

// Writes out[m0 + i, n0 + j] from accumulator[i * stride + j], int32 or float32.
template <class Acc>
using EpilogueFn = void (*)(const Epilogue& epilogue, const Acc* accumulator, int64_t stride, int64_t m0, int64_t rows,
                            int64_t n0, int64_t columns);
extern const EpilogueFn<int32_t> kEpilogueAvx2;
extern const EpilogueFn<int32_t> kEpilogueAvx512;
extern const EpilogueFn<float> kFloatEpilogueAvx2;
extern const EpilogueFn<float> kFloatEpilogueAvx512;

}  // namespace pykernels::cpu
