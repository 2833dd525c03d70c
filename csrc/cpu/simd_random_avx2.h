// The vectors of simd_avx2.h with Philox's random numbers, for the kernels that draw some.
#pragma once

#include "simd_avx2.h"

namespace pykernels::cpu {
namespace {

struct Avx2Random : Avx2 {
  // As in simd_random_avx512.h, for 8 counters: two chains of 4, whose latencies hide each other's.
  static constexpr int kUniforms = 32;
  static void random_words(uint64_t counter, PhiloxKey key, I (&out)[kUniforms / kWidth]) {
    I c0[2], c1[2], c2[2], c3[2];
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      c0[j] =
          _mm256_add_epi64(_mm256_set1_epi64x(static_cast<int64_t>(counter + 4 * j)), _mm256_set_epi64x(3, 1, 2, 0));
      c1[j] = _mm256_srli_epi64(c0[j], 32);
      c2[j] = _mm256_set1_epi64x(key.stream);
      c3[j] = _mm256_set1_epi64x(key.step);
    }
    uint32_t k0 = static_cast<uint32_t>(key.seed), k1 = static_cast<uint32_t>(key.seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < kPhiloxRounds; ++round, k0 += kPhiloxW0, k1 += kPhiloxW1) {
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        const I p0 = _mm256_mul_epu32(c0[j], _mm256_set1_epi64x(kPhiloxM0));
        const I p1 = _mm256_mul_epu32(c2[j], _mm256_set1_epi64x(kPhiloxM1));
        c0[j] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p1, 32), c1[j]), _mm256_set1_epi64x(k0));
        c2[j] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p0, 32), c3[j]), _mm256_set1_epi64x(k1));
        c1[j] = p1;
        c3[j] = p0;
      }
    }
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const I lo = _mm256_blend_epi32(c0[j], _mm256_slli_epi64(c1[j], 32), 0xaa);
      const I hi = _mm256_blend_epi32(c2[j], _mm256_slli_epi64(c3[j], 32), 0xaa);
      out[2 * j] = _mm256_unpacklo_epi64(lo, hi);
      out[2 * j + 1] = _mm256_unpackhi_epi64(lo, hi);
    }
  }
  static void uniforms(uint64_t counter, PhiloxKey key, float* out) {
    I words[kUniforms / kWidth];
    random_words(counter, key, words);
#pragma GCC unroll 4
    for (int j = 0; j < kUniforms / kWidth; ++j)
      store(out + j * kWidth, mul(to_float(shift_right<8>(words[j])), set1(kUniformStep)));
  }

  // Which elements dropout keeps: bits of all ones where word >> 8 >= limit, for kKept elements from a counter whose
  // upper half the constructor was told. Four words of a counter are four neighbours. A chain of rounds is all latency:
  // four side by side spill registers and are still a seventh faster than two.
  static constexpr int kChains = 4, kKept = 16 * kChains;
  class Kept {
   public:
    Kept(uint64_t seed, uint32_t upper, uint32_t limit) {
      const PhiloxRounds rounds(seed, upper);
      for (int r = 0; r < kPhiloxRounds; ++r) k0_[r] = lane(rounds.k0[r]), k1_[r] = lane(rounds.k1[r]);
      third_ = lane(rounds.third), fourth_ = lane(rounds.fourth);
      below_ = set1(static_cast<int32_t>(limit) - 1);
    }

    // In the order that load2_kept wants for elements of type T.
    template <class T>
    void masks(uint32_t counter, I (&mask)[kKept / kWidth]) const {
      const I order = sizeof(T) == 2 ? _mm256_set_epi64x(3, 2, 1, 0) : _mm256_set_epi64x(3, 1, 2, 0);
      const I m0 = lane(kPhiloxM0), m1 = lane(kPhiloxM1);
      // In the lower halves of 64-bit lanes; the upper ones are ignored.
      I c0[kChains], c1[kChains], c2[kChains], c3[kChains];
#pragma GCC unroll 4
      for (int j = 0; j < kChains; ++j) {
        const I p = _mm256_mul_epu32(_mm256_add_epi32(lane(counter + 4 * j), order), m0);
        const I q = _mm256_mul_epu32(_mm256_xor_si256(high(p), k1_[0]), m1);
        c0[j] = _mm256_xor_si256(high(q), k0_[1]), c1[j] = q;
        const I p0 = _mm256_mul_epu32(c0[j], m0), p1 = _mm256_mul_epu32(_mm256_xor_si256(p, third_), m1);
        c0[j] = _mm256_xor_si256(high(p1), _mm256_xor_si256(c1[j], k0_[2])), c1[j] = p1;
        c2[j] = _mm256_xor_si256(high(p0), fourth_), c3[j] = p0;
      }
#pragma GCC unroll 10
      for (int r = 3; r < kPhiloxRounds - 1; ++r) {
#pragma GCC unroll 4
        for (int j = 0; j < kChains; ++j) {
          const I p0 = _mm256_mul_epu32(c0[j], m0), p1 = _mm256_mul_epu32(c2[j], m1);
          c0[j] = _mm256_xor_si256(high(p1), _mm256_xor_si256(c1[j], k0_[r])), c1[j] = p1;
          c2[j] = _mm256_xor_si256(high(p0), _mm256_xor_si256(c3[j], k1_[r])), c3[j] = p0;
        }
      }
#pragma GCC unroll 4
      for (int j = 0; j < kChains; ++j) {
        const I p0 = _mm256_mul_epu32(c0[j], m0), p1 = _mm256_mul_epu32(c2[j], m1);
        const I first = last(p1, _mm256_xor_si256(c1[j], k0_[kPhiloxRounds - 1]));
        const I second = last(p0, _mm256_xor_si256(c3[j], k1_[kPhiloxRounds - 1]));
        mask[2 * j] = kept(_mm256_unpacklo_epi64(first, second));
        mask[2 * j + 1] = kept(_mm256_unpackhi_epi64(first, second));
      }
    }

   private:
    static I lane(uint32_t v) { return _mm256_set1_epi64x(v); }
    static I high(I v) { return _mm256_srli_epi64(v, 32); }
    // (hi(p) ^ the lower half of x, lo(p)).
    static I last(I p, I x) {
      return _mm256_xor_si256(_mm256_shuffle_epi32(p, 0xb1), _mm256_blend_epi32(x, zero(), 0xaa));
    }
    I kept(I words) const { return _mm256_cmpgt_epi32(_mm256_srli_epi32(words, 8), below_); }

    I k0_[kPhiloxRounds], k1_[kPhiloxRounds], third_, fourth_, below_;
  };
  // load2, with 0 where two vectors of a mask are 0.
  static Two load2_kept(const float* p, I a, I b) {
    return {_mm256_and_ps(load(p), _mm256_castsi256_ps(a)), _mm256_and_ps(load(p + kWidth), _mm256_castsi256_ps(b))};
  }
  static Two load2_kept(const f16* p, I a, I b) {
    const I both = load_kept16(p, a, b);
    return {_mm256_cvtph_ps(_mm256_castsi256_si128(both)), _mm256_cvtph_ps(_mm256_extracti128_si256(both, 1))};
  }
  static Two load2_kept(const bf16* p, I a, I b) { return widen2(load_kept16(p, a, b)); }
  static I load_kept16(const void* p, I a, I b) {
    return _mm256_and_si256(_mm256_loadu_si256(static_cast<const I*>(p)), _mm256_packs_epi32(a, b));
  }
};

}  // namespace
}  // namespace pykernels::cpu
