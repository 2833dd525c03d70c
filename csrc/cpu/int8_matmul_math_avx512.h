// Activations to a few float32 ulp of the exact value, and sixteen-wide loads and stores of the float dtypes.
// Include after the standard headers and after #pragma GCC target.
#pragma once

#include <immintrin.h>

#include "../launchers.h"
#include "int8_matmul_tile_avx512.h"

namespace pykernels::cpu::avx512 {
namespace {

inline __m512 load16(const void* p, DType dtype, int64_t index, __mmask16 mask) {
  if (dtype == DType::f32) return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(p) + index);
  const __m256i half = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(p) + index);
  if (dtype == DType::f16) return _mm512_cvtph_ps(half);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// Round to nearest even; a NaN stays a (quiet) NaN.
inline __m256i to_bf16(__m512 v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  rounded = _mm512_mask_or_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), bits, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}

inline void store16(void* p, DType dtype, int64_t index, __m512 v, __mmask16 mask) {
  if (dtype == DType::f32) return _mm512_mask_storeu_ps(static_cast<float*>(p) + index, mask, v);
  const __m256i half =
      dtype == DType::f16 ? _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC) : to_bf16(v);
  _mm256_mask_storeu_epi16(static_cast<uint16_t*>(p) + index, mask, half);
}

struct Doubles {
  __m512d low, high;
};

inline Doubles widen(__m512 v) {
  return {_mm512_cvtps_pd(_mm512_castps512_ps256(v)), _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1))};
}

inline __m512 narrow(__m512d low, __m512d high) {
  return _mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(low)), _mm512_cvtpd_ps(high), 1);
}

// exp(x) as float32. The argument comes in float64, because in the tails one float32 ulp of it is many of the result.
inline __m512 exp_of(Doubles x) {
  const __m512d log2e = _mm512_set1_pd(1.4426950408889634), ln2 = _mm512_set1_pd(0.6931471805599453);
  const __m512d lowest = _mm512_set1_pd(-150.0);
  x.low = _mm512_max_pd(lowest, x.low), x.high = _mm512_max_pd(lowest, x.high);
  const int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  const __m512d n_low = _mm512_roundscale_pd(_mm512_mul_pd(x.low, log2e), nearest);
  const __m512d n_high = _mm512_roundscale_pd(_mm512_mul_pd(x.high, log2e), nearest);
  const __m512 r = narrow(_mm512_fnmadd_pd(n_low, ln2, x.low), _mm512_fnmadd_pd(n_high, ln2, x.high));
  static constexpr float kExp[] = {0.0013836845755577087f,
                                   0.008374815806746483f,
                                   0.04166822507977486f,
                                   0.16666419804096222f,
                                   0.49999991059303284f,
                                   1.0f,
                                   1.0f};
  __m512 p = _mm512_set1_ps(kExp[0]);
#pragma GCC unroll 8
  for (int i = 1; i < 7; ++i) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(kExp[i]));
  return _mm512_scalef_ps(p, narrow(n_low, n_high));
}

// v * sigmoid(s), with exp(-|s|) so that neither tail overflows or cancels.
inline __m512 times_sigmoid(__m512 v, Doubles s) {
  const __m512 e = exp_of({_mm512_or_pd(s.low, _mm512_set1_pd(-0.0)), _mm512_or_pd(s.high, _mm512_set1_pd(-0.0))});
  const __mmask16 negative = static_cast<__mmask16>(_mm512_movepi64_mask(_mm512_castpd_si512(s.low)) |
                                                    _mm512_movepi64_mask(_mm512_castpd_si512(s.high)) << 8);
  return _mm512_div_ps(_mm512_mask_mul_ps(v, negative, v, e), _mm512_add_ps(_mm512_set1_ps(1.0f), e));
}

inline __m512 silu(__m512 v) { return times_sigmoid(v, widen(v)); }

// 0.5 v (1 + tanh(u)) = v sigmoid(2 u), u = sqrt(2 / pi) (v + 0.044715 v^3).
inline __m512 gelu_tanh(__m512 v) {
  const __m512d c1 = _mm512_set1_pd(1.5957691216057308), c3 = _mm512_set1_pd(1.5957691216057308 * 0.044715);
  Doubles x = widen(v);
  x.low = _mm512_mul_pd(x.low, _mm512_fmadd_pd(c3, _mm512_mul_pd(x.low, x.low), c1));
  x.high = _mm512_mul_pd(x.high, _mm512_fmadd_pd(c3, _mm512_mul_pd(x.high, x.high), c1));
  return times_sigmoid(v, x);
}

// v Phi(v). With t = |v|, Phi(-t) = exp(-t^2 / 2) R(t), and (t + 3.5) R(t) is a polynomial in (t - 3.5) / (t + 3.5),
// fitted to 7e-9 on [0, 14.6]; beyond that exp underflows.
inline __m512 gelu(__m512 v) {
  const __m512 t = _mm512_min_ps(_mm512_set1_ps(14.6f), _mm512_abs_ps(v)), c = _mm512_set1_ps(3.5f);
  const __m512 inverse = _mm512_div_ps(_mm512_set1_ps(1.0f), _mm512_add_ps(t, c));
  const __m512 y = _mm512_mul_ps(_mm512_sub_ps(t, c), inverse);
  static constexpr float kTail[] = {0.00011028497101506218f, 0.0004211667401250452f, -0.0004949768772348762f,
                                    -0.003174812300130725f,  0.006493245251476765f,  0.017406268045306206f,
                                    -0.11605306714773178f,   0.3154250681400299f,    -0.5655617713928223f,
                                    0.7444160580635071f};
  __m512 p = _mm512_set1_ps(kTail[0]);
#pragma GCC unroll 10
  for (int i = 1; i < 10; ++i) p = _mm512_fmadd_ps(p, y, _mm512_set1_ps(kTail[i]));
  Doubles x = widen(v);
  x.low = _mm512_mul_pd(_mm512_mul_pd(x.low, x.low), _mm512_set1_pd(-0.5));
  x.high = _mm512_mul_pd(_mm512_mul_pd(x.high, x.high), _mm512_set1_pd(-0.5));
  const __m512 tail = _mm512_mul_ps(_mm512_mul_ps(p, inverse), exp_of(x));  // Phi(-|v|)
  const __mmask16 negative = _mm512_movepi32_mask(_mm512_castps_si512(v));
  const __m512 phi = _mm512_mask_mov_ps(_mm512_sub_ps(_mm512_set1_ps(1.0f), tail), negative, tail);
  return _mm512_mul_ps(v, phi);
}

template <Activation A>
inline __m512 activate(__m512 v) {
  if constexpr (A == Activation::relu)  // the second operand is kept for a NaN
    return _mm512_max_ps(_mm512_setzero_ps(), v);
  else if constexpr (A == Activation::gelu)
    return gelu(v);
  else if constexpr (A == Activation::gelu_tanh)
    return gelu_tanh(v);
  else if constexpr (A == Activation::silu)
    return silu(v);
  else
    return v;
}

}  // namespace
}  // namespace pykernels::cpu::avx512
