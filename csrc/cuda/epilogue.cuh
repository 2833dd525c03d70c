// What happens to a sum before it is stored: zero point, scales, bias, activation, residual, rounding. In float32.
#pragma once

#include "common.cuh"

namespace pykernels::cuda {

// gelu goes through erfc, and gelu_tanh and silu through 1 / (1 + exp): 1 + erf or 1 + tanh cancel for negative v.
__device__ __forceinline__ float activate(float v, Activation activation) {
  switch (activation) {
    case Activation::relu:
      return v < 0.0f ? 0.0f : v;
    case Activation::gelu:
      return 0.5f * v * erfcf(-0.70710678118654752f * v);
    case Activation::gelu_tanh:
      return v / (1.0f + expf(-1.5957691216057308f * (v + 0.044715f * v * v * v)));
    case Activation::silu:
      return v / (1.0f + expf(-v));
    default:
      return v;
  }
}

// bias, activation, residual, and the store of one element.
__device__ __forceinline__ void finish(const Epilogue& e, int64_t m, int64_t n, float v) {
  if (e.bias != nullptr) v = __fadd_rn(v, load_float(e.bias, e.bias_dtype, n));
  v = activate(v, e.activation);
  if (e.residual != nullptr) v = __fadd_rn(v, load_float(e.residual, e.residual_dtype, m * e.residual_stride + n));
  store_float(e.out, e.out_dtype, m * e.out_stride + n, v);
}

__device__ __forceinline__ void finish_int32(const Epilogue& e, int64_t m, int64_t n, int32_t sum) {
  if (e.out_dtype == DType::i32) {
    static_cast<int32_t*>(e.out)[m * e.out_stride + n] = sum;
    return;
  }
  float v;
  if (e.a_zero_point != nullptr) {
    const int64_t zero_point = e.a_zero_point[m * e.a_zero_point_stride];
    v = __ll2float_rn(static_cast<int64_t>(sum) - zero_point * e.b_sum[n]);
  } else {
    v = __int2float_rn(sum);
  }
  if (e.a_scale != nullptr) v = __fmul_rn(v, e.a_scale[m * e.a_scale_stride]);
  if (e.b_scale != nullptr) v = __fmul_rn(v, e.b_scale[n * e.b_scale_stride]);
  finish(e, m, n, v);
}

}  // namespace pykernels::cuda
