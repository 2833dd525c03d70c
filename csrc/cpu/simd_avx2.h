// Eight floats at a time. Include it after every other header and after #pragma GCC target.
#pragma once

namespace pykernels::cpu {
namespace {

struct Avx2 {
  using F = __m256;
  using I = __m256i;
  using H = __m256i;  // 16 values of 16 bits
  static constexpr int kWidth = 8;

  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static F load(const bf16* p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
  static F load(const f16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  template <class T>
  static auto load_tail(const T* p, int n) {
    T padded[kWidth] = {};
    std::memcpy(padded, p, n * sizeof(T));
    return load(padded);
  }

  // 2 * kWidth elements in whatever order is cheapest for the format; store2 of the same type undoes it.
  struct Two {
    F a, b;
  };
  template <class T>
  static Two load2(const T* p) {
    return {load(p), load(p + kWidth)};
  }
  static Two load2(const bf16* p) { return widen2(_mm256_loadu_si256(reinterpret_cast<const I*>(p))); }
  static Two widen2(I both) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(both, 16)),
            _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(static_cast<int>(0xffff0000))))};
  }

  static F set1(float value) { return _mm256_set1_ps(value); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F sqrt(F v) { return _mm256_sqrt_ps(v); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F min(F a, F b) { return _mm256_min_ps(a, b); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static float reduce_min(F v) {
    const __m128 half = _mm_min_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 pair = _mm_min_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_min_ss(pair, _mm_movehdup_ps(pair)));
  }
  static float reduce_max(F v) { return -reduce_min(_mm256_xor_ps(v, set1(-0.0f))); }
  static float reduce_add(F v) {
    const __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
  }
  static F negate(F v) { return _mm256_xor_ps(v, set1(-0.0f)); }
  static F abs(F v) { return _mm256_andnot_ps(set1(-0.0f), v); }
  static F copy_sign(F magnitude, F sign) { return _mm256_or_ps(abs(magnitude), _mm256_and_ps(sign, set1(-0.0f))); }
  // a < b ? yes : no; false for NaN.
  static F if_less(F a, F b, F yes, F no) { return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
  // yes where the sign of v is set.
  static F if_negative(F v, F yes, F no) { return _mm256_blendv_ps(no, yes, v); }
  // v where x is a number, x where it is NaN.
  static F keep_nan(F x, F v) { return _mm256_blendv_ps(v, x, _mm256_cmp_ps(x, x, _CMP_UNORD_Q)); }
  // v where it is a number, other where it is NaN.
  static F number_or(F v, F other) { return _mm256_blendv_ps(v, other, _mm256_cmp_ps(v, v, _CMP_UNORD_Q)); }
  // The two elements of every pair in each other's place.
  static F swap_pairs(F v) { return _mm256_permute_ps(v, 0xb1); }
  // 2^n, -126 <= n <= 127.
  static F power_of_two(I n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
  }
  // 2^n of 1.5 * 2^23 + 127 + n, -126 <= n <= 127: adding rounds to an integer and leaves it in the low bits.
  static F power_of_low_bits(F v) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(v), 23)); }
  // floor(log2(v)) of a positive normal number.
  static I exponent(F v) {
    return _mm256_sub_epi32(_mm256_srli_epi32(_mm256_castps_si256(v), 23), _mm256_set1_epi32(127));
  }
  // 0 wherever the factor is 0, even for NaN.
  static F mul_live(F v, F factor) {
    return _mm256_and_ps(mul(v, factor), _mm256_cmp_ps(factor, _mm256_setzero_ps(), _CMP_NEQ_OQ));
  }
  static F clamp(F v, float lo, float hi) { return _mm256_min_ps(_mm256_max_ps(v, set1(lo)), set1(hi)); }

  static void store(float* p, F v) { _mm256_storeu_ps(p, v); }
  static void store(f16* p, F v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  static void store(bf16* p, F v) {
    const I bits = _mm256_castps_si256(v);
    const I odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const I rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const I nan = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const I unordered = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const I words = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, nan, unordered), 16);
    const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
  }
  template <class T>
  static void store2(T* p, Two v) {
    store(p, v.a), store(p + kWidth, v.b);
  }
  // A NaN must have a low half of 0, as those have that are made by the processor or came from bf16.
  static void store2(bf16* p, Two v) { _mm256_storeu_si256(reinterpret_cast<I*>(p), pack_bf16(v)); }
  static I pack_bf16(Two v) {
    return _mm256_blend_epi16(_mm256_srli_epi32(round_to_bf16(v.a), 16), round_to_bf16(v.b), 0xaa);
  }
  // store2 past the caches, to whole vectors of memory (p % sizeof(F) == 0). fence() orders such stores.
  static void stream2(float* p, Two v) { _mm256_stream_ps(p, v.a), _mm256_stream_ps(p + kWidth, v.b); }
  static void stream2(f16* p, Two v) {
    const __m128i a = _mm256_cvtps_ph(v.a, _MM_FROUND_TO_NEAREST_INT),
                  b = _mm256_cvtps_ph(v.b, _MM_FROUND_TO_NEAREST_INT);
    _mm256_stream_si256(reinterpret_cast<I*>(p), _mm256_set_m128i(b, a));
  }
  static void stream2(bf16* p, Two v) { _mm256_stream_si256(reinterpret_cast<I*>(p), pack_bf16(v)); }
  // Floats as they lie in memory, in the order in which load2 brings those of type T, and back.
  template <class T>
  static Two in_order_of(Two v) {
    if constexpr (!std::is_same_v<T, bf16>) return v;
    const F even = _mm256_shuffle_ps(v.a, v.b, 0x88), odd = _mm256_shuffle_ps(v.a, v.b, 0xdd);
    return {_mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(even), 0xd8)),
            _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(odd), 0xd8))};
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
    const F low = _mm256_unpacklo_ps(v.a, v.b), high = _mm256_unpackhi_ps(v.a, v.b);
    return {_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31)};
  }
  // To nearest even, in the upper half.
  static I round_to_bf16(F v) {
    const I bits = _mm256_castps_si256(v);
    const I odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  }
  template <class T>
  static void store_tail(T* p, F v, int n) {
    T padded[kWidth];
    store(padded, v);
    std::memcpy(p, padded, n * sizeof(T));
  }

  static I set1(int32_t value) { return _mm256_set1_epi32(value); }
  static I load(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const I*>(p)); }
  static I load(const int8_t* p) { return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))); }
  static I load(const uint8_t* p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))); }
  static I load(const int16_t* p) {
    return _mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static I load(const uint16_t* p) {
    return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static void store(int32_t* p, I v) { _mm256_storeu_si256(reinterpret_cast<I*>(p), v); }
  static I add(I a, I b) { return _mm256_add_epi32(a, b); }
  static I sub(I a, I b) { return _mm256_sub_epi32(a, b); }
  static I min(I a, I b) { return _mm256_min_epi32(a, b); }
  static I mul(I a, I b) { return _mm256_mullo_epi32(a, b); }
  static I bit_and(I a, I b) { return _mm256_and_si256(a, b); }
  static I bit_xor(I a, I b) { return _mm256_xor_si256(a, b); }
  template <int n>
  static I shift_left(I v) {
    return _mm256_slli_epi32(v, n);
  }
  // Zeros come in from the left.
  template <int n>
  static I shift_right(I v) {
    return _mm256_srli_epi32(v, n);
  }
  static I bits(F v) { return _mm256_castps_si256(v); }
  static F from_bits(I v) { return _mm256_castsi256_ps(v); }
  static F to_float(I v) { return _mm256_cvtepi32_ps(v); }

  static I zero() { return _mm256_setzero_si256(); }
  static I abs_bits(F v) { return _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x7fffffff)); }
  static I max(I a, I b) { return _mm256_max_epi32(a, b); }
  static uint32_t reduce_max(I v) {
    __m128i m = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1));
    return static_cast<uint32_t>(_mm_cvtsi128_si32(m));
  }
  static I round(F v) { return _mm256_cvtps_epi32(v); }
  static I floor(F v) { return _mm256_cvtps_epi32(_mm256_floor_ps(v)); }

  // Towards 0.
  static I truncate(F v) { return _mm256_cvttps_epi32(v); }
  // magnitude >= 0 towards 0, negated where v is negative; v of 0 goes with a magnitude below 1.
  static I truncate_as(F magnitude, F v) { return _mm256_sign_epi32(truncate(magnitude), _mm256_castps_si256(v)); }

  // v holds values of int8; they are narrowed as they are stored.
  static __m128i narrow(I v) {
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    return _mm_packs_epi16(words, words);
  }
  static void store_i8(int8_t* p, I v) { _mm_storel_epi64(reinterpret_cast<__m128i*>(p), narrow(v)); }
  static void store_i8_tail(int8_t* p, I v, int n) {
    int8_t padded[kWidth];
    store_i8(padded, v);
    std::memcpy(p, padded, n);
  }

  // Four vectors at once.
  static void store_i8(int8_t* p, const I (&v)[4]) {
    const I packed = _mm256_packs_epi16(_mm256_packs_epi32(v[0], v[1]), _mm256_packs_epi32(v[2], v[3]));
    const I order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    _mm256_storeu_si256(reinterpret_cast<I*>(p), _mm256_permutevar8x32_epi32(packed, order));
  }

  static void store_u8(uint8_t* p, I v) {
    const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
  }
  static void store_u8(uint8_t* p, const I (&v)[4]) {
    const I packed = _mm256_packus_epi16(_mm256_packus_epi32(v[0], v[1]), _mm256_packus_epi32(v[2], v[3]));
    const I order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    _mm256_storeu_si256(reinterpret_cast<I*>(p), _mm256_permutevar8x32_epi32(packed, order));
  }
  static void store_u16(uint16_t* p, I v) {
    const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
  }

  static void stream_line(int8_t* p, const int8_t* from) {
    for (int b = 0; b < 64; b += 32)
      _mm256_stream_si256(reinterpret_cast<I*>(p + b), _mm256_load_si256(reinterpret_cast<const I*>(from + b)));
  }
  static void fence() { _mm_sfence(); }

  static H zero16() { return _mm256_setzero_si256(); }
  static H abs16(const void* p) {
    return _mm256_and_si256(_mm256_loadu_si256(static_cast<const __m256i*>(p)), _mm256_set1_epi16(0x7fff));
  }
  static H max16(H a, H b) { return _mm256_max_epu16(a, b); }
  static uint32_t reduce_max16(H v) {
    return reduce_max(max(_mm256_and_si256(v, _mm256_set1_epi32(0xffff)), _mm256_srli_epi32(v, 16)));
  }
};

}  // namespace
}  // namespace pykernels::cpu
