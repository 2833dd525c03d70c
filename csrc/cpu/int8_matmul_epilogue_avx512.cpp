// The epilogue, sixteen columns at a time.
#if defined(__x86_64__)
#include <immintrin.h>

#include <type_traits>

#include "int8_matmul_kernels.h"

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c")
#include "int8_matmul_math_avx512.h"

namespace pykernels::cpu {
namespace avx512 {
namespace {

inline __m512 to_float(const int32_t* p, __mmask16 mask) {
  return _mm512_cvtepi32_ps(_mm512_maskz_loadu_epi32(mask, p));
}
inline __m512 to_float(const float* p, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, p); }

// acc - zero_point * sum in float64, where it is exact, then one rounding.
inline __m512 to_float_corrected(const int32_t* p, const int32_t* sum, int32_t zero_point, __mmask16 mask) {
  const __m512i acc = _mm512_maskz_loadu_epi32(mask, p), columns = _mm512_maskz_loadu_epi32(mask, sum);
  const __m512d zero = _mm512_set1_pd(zero_point);
  const __m512d low = _mm512_fnmadd_pd(zero, _mm512_cvtepi32_pd(_mm512_castsi512_si256(columns)),
                                       _mm512_cvtepi32_pd(_mm512_castsi512_si256(acc)));
  const __m512d high = _mm512_fnmadd_pd(zero, _mm512_cvtepi32_pd(_mm512_extracti64x4_epi64(columns, 1)),
                                        _mm512_cvtepi32_pd(_mm512_extracti64x4_epi64(acc, 1)));
  return narrow(low, high);
}

template <class Acc, Activation A>
void rows_of(const Epilogue& e, const Acc* acc, int64_t stride, int64_t m0, int64_t rows, int64_t n0, int64_t columns) {
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t m = m0 + i;
    const __m512 a_scale = _mm512_set1_ps(e.a_scale ? e.a_scale[m * e.a_scale_stride] : 1.0f);
    const __m512 b_scale_all = _mm512_set1_ps(e.b_scale && e.b_scale_stride == 0 ? *e.b_scale : 1.0f);
    for (int64_t j = 0; j < columns; j += 16) {
      const __mmask16 mask = lane_mask(columns - j);
      const int64_t n = n0 + j;
      __m512 v;
      if constexpr (std::is_same_v<Acc, int32_t>) {
        v = e.a_zero_point
                ? to_float_corrected(acc + i * stride + j, e.b_sum + n, e.a_zero_point[m * e.a_zero_point_stride], mask)
                : to_float(acc + i * stride + j, mask);
      } else {
        v = to_float(acc + i * stride + j, mask);
      }
      v = _mm512_mul_ps(v, a_scale);
      v = _mm512_mul_ps(v, e.b_scale_stride ? _mm512_maskz_loadu_ps(mask, e.b_scale + n) : b_scale_all);
      if (e.bias) v = _mm512_add_ps(v, load16(e.bias, e.bias_dtype, n, mask));
      v = activate<A>(v);
      if (e.residual) v = _mm512_add_ps(v, load16(e.residual, e.residual_dtype, m * e.residual_stride + n, mask));
      store16(e.out, e.out_dtype, m * e.out_stride + n, v, mask);
    }
  }
}

void copy_raw(const Epilogue& e, const int32_t* acc, int64_t stride, int64_t m0, int64_t rows, int64_t n0,
              int64_t columns) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; j += 16) {
      const __mmask16 mask = lane_mask(columns - j);
      _mm512_mask_storeu_epi32(static_cast<int32_t*>(e.out) + (m0 + i) * e.out_stride + n0 + j, mask,
                               _mm512_maskz_loadu_epi32(mask, acc + i * stride + j));
    }
}

template <class Acc>
void epilogue(const Epilogue& e, const Acc* acc, int64_t stride, int64_t m0, int64_t rows, int64_t n0,
              int64_t columns) {
  switch (e.activation) {
    case Activation::none:
      return rows_of<Acc, Activation::none>(e, acc, stride, m0, rows, n0, columns);
    case Activation::relu:
      return rows_of<Acc, Activation::relu>(e, acc, stride, m0, rows, n0, columns);
    case Activation::gelu:
      return rows_of<Acc, Activation::gelu>(e, acc, stride, m0, rows, n0, columns);
    case Activation::gelu_tanh:
      return rows_of<Acc, Activation::gelu_tanh>(e, acc, stride, m0, rows, n0, columns);
    case Activation::silu:
      return rows_of<Acc, Activation::silu>(e, acc, stride, m0, rows, n0, columns);
  }
}

void epilogue_int32(const Epilogue& e, const int32_t* acc, int64_t stride, int64_t m0, int64_t rows, int64_t n0,
                    int64_t columns) {
  if (e.out_dtype == DType::i32) return copy_raw(e, acc, stride, m0, rows, n0, columns);
  epilogue<int32_t>(e, acc, stride, m0, rows, n0, columns);
}

}  // namespace
}  // namespace avx512

const EpilogueFn<int32_t> kEpilogueAvx512 = avx512::epilogue_int32;
const EpilogueFn<float> kFloatEpilogueAvx512 = avx512::epilogue<float>;

}  // namespace pykernels::cpu

#endif
