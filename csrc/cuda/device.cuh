// The few device instructions the kernels use, each behind one function, and the launch itself.
// tests/cuda_emulator defines PYKERNELS_CUDA_EMULATED and supplies the same names on the CPU.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef PYKERNELS_CUDA_EMULATED
#include "cuda_emulator.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace pykernels::cuda {

struct Vec16 {
  uint32_t word[4];
};

struct Vec8 {
  uint32_t word[2];
};

__device__ __forceinline__ Vec8 load8(const void* source) {
  const uint2 v = *static_cast<const uint2*>(source);
  return {{v.x, v.y}};
}

__device__ __forceinline__ Vec16 load16(const void* source) {
  const uint4 v = *static_cast<const uint4*>(source);
  return {{v.x, v.y, v.z, v.w}};
}

// For data read once: leaves L1 to what is read again.
__device__ __forceinline__ Vec16 load16_streaming(const void* source) {
  Vec16 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "l"(source));
  return v;
}

__device__ __forceinline__ void store16(void* target, const Vec16& v) {
  *static_cast<uint4*>(target) = make_uint4(v.word[0], v.word[1], v.word[2], v.word[3]);
}

// To global memory as one instruction: the compiler takes a plain store apart where another branch stores elements.
__device__ __forceinline__ void store16_global(void* target, const Vec16& v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(target), "r"(v.word[0]), "r"(v.word[1]), "r"(v.word[2]),
               "r"(v.word[3])
               : "memory");
}

__device__ __forceinline__ void store8(void* target, uint32_t low, uint32_t high) {
  *static_cast<uint2*>(target) = make_uint2(low, high);
}

__device__ __forceinline__ void store4(void* target, uint32_t v) { *static_cast<uint32_t*>(target) = v; }

__device__ __forceinline__ float bits_to_float(uint32_t bits) { return __uint_as_float(bits); }
__device__ __forceinline__ uint32_t float_to_bits(float v) { return __float_as_uint(v); }
__device__ __forceinline__ float half_to_float(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
__device__ __forceinline__ uint16_t float_to_half(float v) { return __half_as_ushort(__float2half_rn(v)); }
__device__ __forceinline__ uint16_t float_to_bfloat16(float v) { return __bfloat16_as_ushort(__float2bfloat16_rn(v)); }

// Byte i of the result is the one of a (0 to 3) or b (4 to 7) that the selector's hexadecimal digit i names.
__device__ __forceinline__ uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t selector) {
  return __byte_perm(a, b, selector);
}

// Two differences at once, each rounded to its type.
__device__ __forceinline__ uint32_t subtract_half2(uint32_t a, uint32_t b) {
  const __half2 d = __hsub2(*reinterpret_cast<const __half2*>(&a), *reinterpret_cast<const __half2*>(&b));
  return *reinterpret_cast<const uint32_t*>(&d);
}
__device__ __forceinline__ uint32_t subtract_bfloat2(uint32_t a, uint32_t b) {
  const __nv_bfloat162 d =
      __hsub2(*reinterpret_cast<const __nv_bfloat162*>(&a), *reinterpret_cast<const __nv_bfloat162*>(&b));
  return *reinterpret_cast<const uint32_t*>(&d);
}

// Bytes first to first + bytes - 1 come from global memory, the rest of the 16 are zeros.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, int bytes) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(bytes) : "memory");
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* shared) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void mma_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ uint32_t warp_max(uint32_t v) { return __reduce_max_sync(0xffffffffu, v); }

template <typename T>
__device__ __forceinline__ T warp_sum(T v) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
  return v;
}

// Lane i gets the sum over lanes 0 to i.
template <typename T>
__device__ __forceinline__ T warp_scan(T v) {
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const T below = __shfl_up_sync(0xffffffffu, v, offset);
    if (threadIdx.x % 32 >= offset) v += below;
  }
  return v;
}

__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char buffer[];
  return buffer;
}

inline int multiprocessor_count() {
  int device = 0, count = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

// Where the current device sees pinned host memory.
inline const char* mapped_address(const void* host, void** device) {
  const cudaError_t error = cudaHostGetDevicePointer(device, const_cast<void*>(host), 0);
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // or the next launch would be blamed for it
  return cudaGetErrorString(error);
}

inline bool is_capturing(void* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  return cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status) == cudaSuccess &&
         status == cudaStreamCaptureStatusActive;
}

// Null when the launch was accepted, else CUDA's own words.
template <typename... Params, typename... Args>
const char* launch(void (*kernel)(Params...), int64_t blocks_x, int64_t blocks_y, int threads, size_t shared_bytes,
                   void* stream, const Args&... args) {
  if (blocks_x > 0x7fffffffLL || blocks_y > 65535)
    return "the tensor needs more thread blocks than one launch can have";
  cudaError_t error = cudaSuccess;
  if (shared_bytes > 48 * 1024) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  }
  if (error == cudaSuccess) {
    const dim3 grid(static_cast<unsigned>(blocks_x), static_cast<unsigned>(blocks_y));
    kernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(args...);
    error = cudaGetLastError();
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace pykernels::cuda

#endif
