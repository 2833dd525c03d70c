// The vectors of simd_avx512.h with Philox's random numbers, for the kernels that draw some.
#pragma once

#include "simd_avx512.h"

namespace pykernels::cpu {
namespace {

struct Avx512Random : Avx512 {
  // The words of 8 counters, in order. Counters sit in 64-bit lanes in the order that
  // makes the two final unpacks land sorted; the upper half of a lane is ignored by the widening product.
  static constexpr int kUniforms = 32;
  static void random_words(uint64_t counter, PhiloxKey key, I (&out)[kUniforms / kWidth]) {
    const I c =
        _mm512_add_epi64(_mm512_set1_epi64(static_cast<int64_t>(counter)), _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0));
    I c0 = c, c1 = _mm512_srli_epi64(c, 32), c2 = _mm512_set1_epi64(key.stream), c3 = _mm512_set1_epi64(key.step);
    uint32_t k0 = static_cast<uint32_t>(key.seed), k1 = static_cast<uint32_t>(key.seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < kPhiloxRounds; ++round, k0 += kPhiloxW0, k1 += kPhiloxW1) {
      const I p0 = _mm512_mul_epu32(c0, _mm512_set1_epi64(kPhiloxM0));
      const I p1 = _mm512_mul_epu32(c2, _mm512_set1_epi64(kPhiloxM1));
      c0 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p1, 32), c1, _mm512_set1_epi64(k0), 0x96);
      c2 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p0, 32), c3, _mm512_set1_epi64(k1), 0x96);
      c1 = p1;
      c3 = p0;
    }
    const I lo = _mm512_mask_blend_epi32(0xaaaa, c0, _mm512_slli_epi64(c1, 32));
    const I hi = _mm512_mask_blend_epi32(0xaaaa, c2, _mm512_slli_epi64(c3, 32));
    out[0] = _mm512_unpacklo_epi64(lo, hi);
    out[1] = _mm512_unpackhi_epi64(lo, hi);
  }
  static void uniforms(uint64_t counter, PhiloxKey key, float* out) {
    I words[kUniforms / kWidth];
    random_words(counter, key, words);
#pragma GCC unroll 2
    for (int j = 0; j < kUniforms / kWidth; ++j)
      store(out + j * kWidth, mul(to_float(shift_right<8>(words[j])), set1(kUniformStep)));
  }

  // As in simd_random_avx2.h; every type takes the same order.
  static constexpr int kKept = 32;
  class Kept {
   public:
    Kept(uint64_t seed, uint32_t upper, uint32_t limit) {
      const PhiloxRounds rounds(seed, upper);
      for (int r = 0; r < kPhiloxRounds; ++r) k0_[r] = lane(rounds.k0[r]), k1_[r] = lane(rounds.k1[r]);
      third_ = lane(rounds.third), fourth_ = lane(rounds.fourth);
      limit_ = set1(static_cast<int32_t>(limit));
    }

    template <class T>
    void masks(uint32_t counter, I (&mask)[kKept / kWidth]) const {
      const I m0 = lane(kPhiloxM0), m1 = lane(kPhiloxM1);
      const I p = _mm512_mul_epu32(_mm512_add_epi32(lane(counter), _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0)), m0);
      const I q = _mm512_mul_epu32(_mm512_xor_si512(high(p), k1_[0]), m1);
      I p0 = _mm512_mul_epu32(_mm512_xor_si512(high(q), k0_[1]), m0);
      I p1 = _mm512_mul_epu32(_mm512_xor_si512(p, third_), m1);
      I c0 = xor3(high(p1), q, k0_[2]), c1 = p1, c2 = _mm512_xor_si512(high(p0), fourth_), c3 = p0;
#pragma GCC unroll 10
      for (int r = 3; r < kPhiloxRounds; ++r) {
        p0 = _mm512_mul_epu32(c0, m0), p1 = _mm512_mul_epu32(c2, m1);
        c0 = xor3(high(p1), c1, k0_[r]), c1 = p1;
        c2 = xor3(high(p0), c3, k1_[r]), c3 = p0;
      }
      const I lo = _mm512_mask_blend_epi32(0xaaaa, c0, _mm512_slli_epi64(c1, 32));
      const I hi = _mm512_mask_blend_epi32(0xaaaa, c2, _mm512_slli_epi64(c3, 32));
      mask[0] = kept(_mm512_unpacklo_epi64(lo, hi));
      mask[1] = kept(_mm512_unpackhi_epi64(lo, hi));
    }

   private:
    static I lane(uint32_t v) { return _mm512_set1_epi64(v); }
    static I high(I v) { return _mm512_srli_epi64(v, 32); }
    static I xor3(I a, I b, I c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
    I kept(I words) const { return _mm512_movm_epi32(_mm512_cmpge_epi32_mask(_mm512_srli_epi32(words, 8), limit_)); }

    I k0_[kPhiloxRounds], k1_[kPhiloxRounds], third_, fourth_, limit_;
  };
  static Two load2_kept(const float* p, I a, I b) {
    return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), a)),
            _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p + kWidth), b))};
  }
  static Two load2_kept(const f16* p, I a, I b) {
    const I both = load_kept16(p, a, b);
    return {_mm512_cvtph_ps(_mm512_castsi512_si256(both)), _mm512_cvtph_ps(_mm512_extracti64x4_epi64(both, 1))};
  }
  static Two load2_kept(const bf16* p, I a, I b) { return widen2(load_kept16(p, a, b)); }
  static I load_kept16(const void* p, I a, I b) {
    const I mask = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(a)), _mm512_cvtepi32_epi16(b), 1);
    return _mm512_and_si512(_mm512_loadu_si512(p), mask);
  }
};

}  // namespace
}  // namespace pykernels::cpu
