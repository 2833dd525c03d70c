// Sixteen floats at a time. Include it after every other header and after #pragma GCC target.
#pragma once

namespace pykernels::cpu {
namespace {

struct Avx512 {
  using F = __m512;
  using I = __m512i;
  using H = __m512i;  // 32 values of 16 bits
  static constexpr int kWidth = 16;

  static __mmask16 tail(int n) { return static_cast<__mmask16>((1u << n) - 1); }

  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static F load(const bf16* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  static F load(const f16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static F load_tail(const float* p, int n) { return _mm512_maskz_loadu_ps(tail(n), p); }
  static F load_tail(const bf16* p, int n) {
    const __m256i half = _mm256_maskz_loadu_epi16(tail(n), p);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  static F load_tail(const f16* p, int n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(tail(n), p)); }

  // As in simd_avx2.h.
  struct Two {
    F a, b;
  };
  template <class T>
  static Two load2(const T* p) {
    return {load(p), load(p + kWidth)};
  }
  static Two load2(const bf16* p) { return widen2(_mm512_loadu_si512(p)); }
  static Two widen2(I both) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(both, 16)),
            _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(static_cast<int>(0xffff0000))))};
  }

  static F set1(float value) { return _mm512_set1_ps(value); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F sqrt(F v) { return _mm512_sqrt_ps(v); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static float reduce_min(F v) { return _mm512_reduce_min_ps(v); }
  static float reduce_max(F v) { return _mm512_reduce_max_ps(v); }
  static float reduce_add(F v) { return _mm512_reduce_add_ps(v); }
  static F negate(F v) { return _mm512_xor_ps(v, set1(-0.0f)); }
  static F abs(F v) { return _mm512_andnot_ps(set1(-0.0f), v); }
  static F copy_sign(F magnitude, F sign) {
    return from_bits(_mm512_ternarylogic_epi32(bits(set1(-0.0f)), bits(sign), bits(magnitude), 0xca));
  }
  // a < b ? yes : no; false for NaN.
  static F if_less(F a, F b, F yes, F no) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
  }
  // yes where the sign of v is set.
  static F if_negative(F v, F yes, F no) {
    return _mm512_mask_blend_ps(_mm512_movepi32_mask(_mm512_castps_si512(v)), no, yes);
  }
  // v where x is a number, x where it is NaN.
  static F keep_nan(F x, F v) { return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), v, x); }
  // v where it is a number, other where it is NaN.
  static F number_or(F v, F other) { return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), v, other); }
  // The two elements of every pair in each other's place.
  static F swap_pairs(F v) { return _mm512_permute_ps(v, 0xb1); }
  // 2^n, -126 <= n <= 127.
  static F power_of_two(I n) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(n, _mm512_set1_epi32(127)), 23));
  }
  // As in simd_avx2.h.
  static F power_of_low_bits(F v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(v), 23)); }
  // floor(log2(v)) of a positive normal number.
  static I exponent(F v) {
    return _mm512_sub_epi32(_mm512_srli_epi32(_mm512_castps_si512(v), 23), _mm512_set1_epi32(127));
  }
  // 0 wherever the factor is 0, even for NaN.
  static F mul_live(F v, F factor) {
    return _mm512_maskz_mul_ps(_mm512_cmp_ps_mask(factor, _mm512_setzero_ps(), _CMP_NEQ_OQ), v, factor);
  }
  static F clamp(F v, float lo, float hi) { return _mm512_min_ps(_mm512_max_ps(v, set1(lo)), set1(hi)); }

  static void store(float* p, F v) { _mm512_storeu_ps(p, v); }
  static void store(bf16* p, F v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bf16(v)); }
  static void store(f16* p, F v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_f16(v)); }
  // As in simd_avx2.h.
  template <class T>
  static void store2(T* p, Two v) {
    store(p, v.a), store(p + kWidth, v.b);
  }
  static void store2(bf16* p, Two v) { _mm512_storeu_si512(p, pack_bf16(v)); }
  static I pack_bf16(Two v) {
    return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(round_to_bf16(v.a), 16), round_to_bf16(v.b));
  }
  static void stream2(float* p, Two v) { _mm512_stream_ps(p, v.a), _mm512_stream_ps(p + kWidth, v.b); }
  static void stream2(f16* p, Two v) {
    const I both = _mm512_inserti64x4(_mm512_castsi256_si512(to_f16(v.a)), to_f16(v.b), 1);
    _mm512_stream_si512(reinterpret_cast<I*>(p), both);
  }
  static void stream2(bf16* p, Two v) { _mm512_stream_si512(reinterpret_cast<I*>(p), pack_bf16(v)); }
  template <class T>
  static Two in_order_of(Two v) {
    if constexpr (!std::is_same_v<T, bf16>) return v;
    const I even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    return {_mm512_permutex2var_ps(v.a, even, v.b),
            _mm512_permutex2var_ps(v.a, _mm512_add_epi32(even, _mm512_set1_epi32(1)), v.b)};
  }
  // swap_pairs of two vectors in that order.
  template <class T>
  static Two swap_pairs2(Two v) {
    if constexpr (std::is_same_v<T, bf16>) return {v.b, v.a};
    return {swap_pairs(v.a), swap_pairs(v.b)};
  }
  template <class T>
  static Two from_order_of(Two v) {
    if constexpr (!std::is_same_v<T, bf16>) return v;
    const I low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    return {_mm512_permutex2var_ps(v.a, low, v.b),
            _mm512_permutex2var_ps(v.a, _mm512_add_epi32(low, _mm512_set1_epi32(8)), v.b)};
  }
  static I round_to_bf16(F v) {
    const I bits = _mm512_castps_si512(v);
    const I odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  }
  static void store_tail(float* p, F v, int n) { _mm512_mask_storeu_ps(p, tail(n), v); }
  static void store_tail(bf16* p, F v, int n) { _mm256_mask_storeu_epi16(p, tail(n), to_bf16(v)); }
  static void store_tail(f16* p, F v, int n) { _mm256_mask_storeu_epi16(p, tail(n), to_f16(v)); }
  static __m256i to_f16(F v) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static __m256i to_bf16(F v) {
    const I bits = _mm512_castps_si512(v);
    const I odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const I rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const I nan = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    const __mmask16 unordered = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, unordered, nan), 16));
  }

  static I set1(int32_t value) { return _mm512_set1_epi32(value); }
  static I load(const int32_t* p) { return _mm512_loadu_si512(p); }
  static I load_tail(const int32_t* p, int n) { return _mm512_maskz_loadu_epi32(tail(n), p); }
  static I load(const int8_t* p) { return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static I load_tail(const int8_t* p, int n) { return _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(tail(n), p)); }
  static I load(const uint8_t* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static I load(const int16_t* p) {
    return _mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static I load(const uint16_t* p) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static void store(int32_t* p, I v) { _mm512_storeu_si512(p, v); }
  static I add(I a, I b) { return _mm512_add_epi32(a, b); }
  static I sub(I a, I b) { return _mm512_sub_epi32(a, b); }
  static I min(I a, I b) { return _mm512_min_epi32(a, b); }
  static I mul(I a, I b) { return _mm512_mullo_epi32(a, b); }
  static I bit_and(I a, I b) { return _mm512_and_si512(a, b); }
  static I bit_xor(I a, I b) { return _mm512_xor_si512(a, b); }
  template <int n>
  static I shift_left(I v) {
    return _mm512_slli_epi32(v, n);
  }
  // Zeros come in from the left.
  template <int n>
  static I shift_right(I v) {
    return _mm512_srli_epi32(v, n);
  }
  static I bits(F v) { return _mm512_castps_si512(v); }
  static F from_bits(I v) { return _mm512_castsi512_ps(v); }
  static F to_float(I v) { return _mm512_cvtepi32_ps(v); }

  static I zero() { return _mm512_setzero_si512(); }
  static I abs_bits(F v) { return _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fffffff)); }
  static I max(I a, I b) { return _mm512_max_epi32(a, b); }
  static uint32_t reduce_max(I v) { return static_cast<uint32_t>(_mm512_reduce_max_epi32(v)); }
  static I round(F v) { return _mm512_cvtps_epi32(v); }
  static I floor(F v) { return _mm512_cvt_roundps_epi32(v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }

  // Towards 0.
  static I truncate(F v) { return _mm512_cvttps_epi32(v); }
  // magnitude >= 0 towards 0, negated where v is negative; v of 0 goes with a magnitude below 1.
  static I truncate_as(F magnitude, F v) { return truncate(copy_sign(magnitude, v)); }

  // v holds values of int8; they are narrowed as they are stored.
  static void store_i8(int8_t* p, I v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(v)); }
  static void store_i8_tail(int8_t* p, I v, int n) { _mm512_mask_cvtepi32_storeu_epi8(p, tail(n), v); }

  // Four vectors at once, as one line of 64 bytes.
  static void store_i8(int8_t* p, const I (&v)[4]) {
    const I packed = _mm512_packs_epi16(_mm512_packs_epi32(v[0], v[1]), _mm512_packs_epi32(v[2], v[3]));
    const I order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm512_storeu_si512(p, _mm512_permutexvar_epi32(order, packed));
  }

  // As store_i8, for values of uint8 and uint16.
  static void store_u8(uint8_t* p, I v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(v)); }
  static void store_u8(uint8_t* p, const I (&v)[4]) {
    const I packed = _mm512_packus_epi16(_mm512_packus_epi32(v[0], v[1]), _mm512_packus_epi32(v[2], v[3]));
    const I order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm512_storeu_si512(p, _mm512_permutexvar_epi32(order, packed));
  }
  static void store_u16(uint16_t* p, I v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(v));
  }

  // 64 aligned bytes past the caches; fence() orders such stores before what follows.
  static void stream_line(int8_t* p, const int8_t* from) {
    _mm512_stream_si512(reinterpret_cast<I*>(p), _mm512_load_si512(from));
  }
  static void fence() { _mm_sfence(); }

  static H zero16() { return _mm512_setzero_si512(); }
  static H abs16(const void* p) { return _mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi16(0x7fff)); }
  static H max16(H a, H b) { return _mm512_max_epu16(a, b); }
  static uint32_t reduce_max16(H v) {
    return reduce_max(_mm512_max_epu32(_mm512_and_si512(v, _mm512_set1_epi32(0xffff)), _mm512_srli_epi32(v, 16)));
  }
};

}  // namespace
}  // namespace pykernels::cpu
