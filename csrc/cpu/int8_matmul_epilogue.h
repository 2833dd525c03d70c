// The epilogue in plain C++, in loops the compiler vectorises for the target in force; branch-free activations.
// Under #pragma GCC target, include the headers below before it: only what this file defines may be built for the
// target.
#pragma once

#include <algorithm>
#include <type_traits>

#include "../launchers.h"
#include "float_types.h"

namespace pykernels::cpu {
namespace {

constexpr int64_t kEpilogueWidth = 64;

// exp(x) as float32, x <= 0. The argument is float64, because in the tails one float32 ulp of it is many of the result.
inline float exp_of(double x) {
  x = x < -150.0 ? -150.0 : x;
  const double shift = 0x1.8p52;  // adding it rounds to an integer
  const double n = (x * 1.4426950408889634 + shift) - shift;
  const float r = static_cast<float>(x - n * 0.6931471805599453);
  float p = 0.0013836845755577087f;
  p = p * r + 0.008374815806746483f;
  p = p * r + 0.04166822507977486f;
  p = p * r + 0.16666419804096222f;
  p = p * r + 0.49999991059303284f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  // 2^n in two factors, so that a subnormal result is rounded once. A NaN has passed through p already.
  const int32_t whole = x == x ? static_cast<int32_t>(n) : 0;
  const int32_t half = whole / 2;
  return p * float_of(static_cast<uint32_t>(half + 127) << 23) *
         float_of(static_cast<uint32_t>(whole - half + 127) << 23);
}

// v * sigmoid(s), with exp(-|s|) so that neither tail overflows or cancels.
inline float times_sigmoid(float v, double s) {
  const float e = exp_of(s < 0 ? s : -s);
  return (s < 0 ? v * e : v) / (1.0f + e);
}

inline float silu(float v) { return times_sigmoid(v, v); }

// 0.5 v (1 + tanh(u)) = v sigmoid(2 u), u = sqrt(2 / pi) (v + 0.044715 v^3).
inline float gelu_tanh(float v) {
  const double x = v;
  return times_sigmoid(v, x * 1.5957691216057308 * (1.0 + 0.044715 * x * x));
}

// v Phi(v). With t = |v|, Phi(-t) = exp(-t^2 / 2) R(t), and (t + 3.5) R(t) is a polynomial in (t - 3.5) / (t + 3.5),
// fitted to 7e-9 on [0, 14.6]; beyond that exp underflows.
inline float gelu(float v) {
  const float a = v < 0 ? -v : v, t = a > 14.6f ? 14.6f : a;
  const float inverse = 1.0f / (t + 3.5f), y = (t - 3.5f) * inverse;
  float p = 0.00011028497101506218f;
  p = p * y + 0.0004211667401250452f;
  p = p * y - 0.0004949768772348762f;
  p = p * y - 0.003174812300130725f;
  p = p * y + 0.006493245251476765f;
  p = p * y + 0.017406268045306206f;
  p = p * y - 0.11605306714773178f;
  p = p * y + 0.3154250681400299f;
  p = p * y - 0.5655617713928223f;
  p = p * y + 0.7444160580635071f;
  const double x = v;
  const float tail = p * inverse * exp_of(-0.5 * x * x);  // Phi(-|v|)
  return v * (v < 0 ? tail : 1.0f - tail);
}

inline void activate(Activation activation, float* v, int64_t count) {
  switch (activation) {
    case Activation::none:
      break;
    case Activation::relu:
      for (int64_t j = 0; j < count; ++j) v[j] = v[j] < 0 ? 0.0f : v[j];
      break;
    case Activation::gelu:
      for (int64_t j = 0; j < count; ++j) v[j] = gelu(v[j]);
      break;
    case Activation::gelu_tanh:
      for (int64_t j = 0; j < count; ++j) v[j] = gelu_tanh(v[j]);
      break;
    case Activation::silu:
      for (int64_t j = 0; j < count; ++j) v[j] = silu(v[j]);
      break;
  }
}

template <class T>
void add(const T* p, float* v, int64_t count) {
  for (int64_t j = 0; j < count; ++j) v[j] += to_float(p[j]);
}

inline void add_any(const void* p, DType dtype, int64_t index, float* v, int64_t count) {
  if (dtype == DType::f32) return add(static_cast<const float*>(p) + index, v, count);
  if (dtype == DType::f16) return add(static_cast<const f16*>(p) + index, v, count);
  add(static_cast<const bf16*>(p) + index, v, count);
}

template <class T>
void store(const float* v, T* p, int64_t count) {
  for (int64_t j = 0; j < count; ++j) p[j] = from_float<T>(v[j]);
}

inline void store_any(const float* v, DType dtype, void* p, int64_t index, int64_t count) {
  if (dtype == DType::f32) return store(v, static_cast<float*>(p) + index, count);
  if (dtype == DType::f16) return store(v, static_cast<f16*>(p) + index, count);
  store(v, static_cast<bf16*>(p) + index, count);
}

template <class Acc>
void epilogue(const Epilogue& e, const Acc* acc, int64_t stride, int64_t m0, int64_t rows, int64_t n0,
              int64_t columns) {
  float v[kEpilogueWidth];
  for (int64_t m = m0; m < m0 + rows; ++m, acc += stride)
    for (int64_t j0 = 0; j0 < columns; j0 += kEpilogueWidth) {
      const int64_t n = n0 + j0, count = std::min(kEpilogueWidth, columns - j0);
      const Acc* from = acc + j0;
      if (std::is_same_v<Acc, int32_t> && e.a_zero_point != nullptr) {
        // Exact in float64, then one rounding.
        const double zero_point = e.a_zero_point[m * e.a_zero_point_stride];
        for (int64_t j = 0; j < count; ++j)
          v[j] = static_cast<float>(static_cast<double>(from[j]) - zero_point * e.b_sum[n + j]);
      } else {
        for (int64_t j = 0; j < count; ++j) v[j] = static_cast<float>(from[j]);
      }
      const float a_scale = e.a_scale != nullptr ? e.a_scale[m * e.a_scale_stride] : 1.0f;
      if (e.b_scale != nullptr && e.b_scale_stride != 0) {
        for (int64_t j = 0; j < count; ++j) v[j] = v[j] * a_scale * e.b_scale[n + j];
      } else {
        const float b_scale = e.b_scale != nullptr ? *e.b_scale : 1.0f;
        for (int64_t j = 0; j < count; ++j) v[j] = v[j] * a_scale * b_scale;
      }
      if (e.bias != nullptr) add_any(e.bias, e.bias_dtype, n, v, count);
      activate(e.activation, v, count);
      if (e.residual != nullptr) add_any(e.residual, e.residual_dtype, m * e.residual_stride + n, v, count);
      store_any(v, e.out_dtype, e.out, m * e.out_stride + n, count);
    }
}

inline void epilogue_int32(const Epilogue& e, const int32_t* acc, int64_t stride, int64_t m0, int64_t rows, int64_t n0,
                           int64_t columns) {
  if (e.out_dtype != DType::i32) return epilogue(e, acc, stride, m0, rows, n0, columns);
  for (int64_t i = 0; i < rows; ++i)
    std::copy_n(acc + i * stride, columns, static_cast<int32_t*>(e.out) + (m0 + i) * e.out_stride + n0);
}

}  // namespace
}  // namespace pykernels::cpu
