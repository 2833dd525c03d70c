// The table of kernels that each instruction set fills in, one entry per input dtype: f32, f16, bf16.
#pragma once

#include "../launchers.h"

namespace pykernels::cpu {

struct QuantizeKernels {
  void (*rowwise[3])(const QuantizeRowwise&, int64_t begin, int64_t end);
  void (*absmax[3])(const QuantizeColwise&, int64_t begin, int64_t end, uint32_t* absmax, uint32_t* row_absmax);
  void (*colwise[3])(const QuantizeColwise&, int64_t begin, int64_t end);
  void (*both[3])(const QuantizeBoth&, int64_t begin, int64_t end);
  void (*blockwise[3])(const QuantizeBlockwise&, int64_t begin, int64_t end);
  void (*asymmetric[3])(const QuantizeAsymmetric&, int64_t begin, int64_t end);
  void (*dequantize[3])(const Dequantize&, int64_t begin, int64_t end, void* row);
};

extern const QuantizeKernels kQuantizePortable;
#if defined(__x86_64__)
extern const QuantizeKernels kQuantizeAvx2;
extern const QuantizeKernels kQuantizeAvx512;
#endif

}  // namespace pykernels::cpu
