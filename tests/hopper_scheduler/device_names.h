// Names that CUTLASS's headers use in device functions, for a compiler that has no device. None of them is called.
#pragma once

#include <cuda_runtime.h>

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
inline void __syncthreads() {}
inline void __syncwarp(unsigned = 0xffffffffu) {}
inline void __threadfence() {}
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int atomicAdd(int* p, int v) { return (*p += v) - v; }
inline int atomicCAS(int* p, int, int) { return *p; }
