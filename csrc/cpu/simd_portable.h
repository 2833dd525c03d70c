// Four floats at a time in the compiler's own vector types: SSE2, NEON, or plain scalar code where there is neither.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "float_types.h"
#include "philox.h"

namespace pykernels::cpu {
namespace {

struct Portable {
  typedef float F __attribute__((vector_size(16)));
  typedef int32_t I __attribute__((vector_size(16)));
  typedef uint32_t U __attribute__((vector_size(16)));
  typedef int16_t H __attribute__((vector_size(16)));
  static constexpr int kWidth = 4;

  static F load(const float* p) {
    F v;
    std::memcpy(&v, p, sizeof(v));
    return v;
  }
  template <class T>
  static F load(const T* p) {
    return F{cpu::to_float(p[0]), cpu::to_float(p[1]), cpu::to_float(p[2]), cpu::to_float(p[3])};
  }
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

  static F set1(float value) { return F{value, value, value, value}; }
  static F mul(F a, F b) { return a * b; }
  static F add(F a, F b) { return a + b; }
  static F sub(F a, F b) { return a - b; }
  static F div(F a, F b) { return a / b; }
  static F sqrt(F v) {
    return F{__builtin_sqrtf(v[0]), __builtin_sqrtf(v[1]), __builtin_sqrtf(v[2]), __builtin_sqrtf(v[3])};
  }
  // Rounds twice: a true fused product is a library call here.
  static F fma(F a, F b, F c) { return a * b + c; }
  static F min(F a, F b) { return a < b ? a : b; }
  static F max(F a, F b) { return a > b ? a : b; }
  static float reduce_min(F v) { return std::min(std::min(v[0], v[1]), std::min(v[2], v[3])); }
  static float reduce_max(F v) { return std::max(std::max(v[0], v[1]), std::max(v[2], v[3])); }
  static float reduce_add(F v) { return (v[0] + v[2]) + (v[1] + v[3]); }
  static F negate(F v) { return -v; }
  static F abs(F v) { return reinterpret_cast<F>(reinterpret_cast<I>(v) & 0x7fffffff); }
  static F copy_sign(F magnitude, F sign) {
    return reinterpret_cast<F>(abs_bits(magnitude) | (reinterpret_cast<I>(sign) & static_cast<int32_t>(0x80000000)));
  }
  // a < b ? yes : no; false for NaN.
  static F if_less(F a, F b, F yes, F no) { return a < b ? yes : no; }
  // yes where the sign of v is set.
  static F if_negative(F v, F yes, F no) { return reinterpret_cast<I>(v) < 0 ? yes : no; }
  // v where x is a number, x where it is NaN.
  static F keep_nan(F x, F v) { return x == x ? v : x; }
  // v where it is a number, other where it is NaN.
  static F number_or(F v, F other) { return v == v ? v : other; }
  // The two elements of every pair in each other's place.
  static F swap_pairs(F v) { return F{v[1], v[0], v[3], v[2]}; }
  // 2^n, -126 <= n <= 127.
  static F power_of_two(I n) { return reinterpret_cast<F>((n + 127) << 23); }
  // 2^n of 1.5 * 2^23 + 127 + n, -126 <= n <= 127: adding rounds to an integer and leaves it in the low bits.
  static F power_of_low_bits(F v) { return reinterpret_cast<F>(reinterpret_cast<I>(v) << 23); }
  // floor(log2(v)) of a positive normal number.
  static I exponent(F v) { return (reinterpret_cast<I>(v) >> 23) - 127; }
  // 0 wherever the factor is 0, even for NaN.
  static F mul_live(F v, F factor) { return factor != 0.0f ? v * factor : F{}; }
  static F clamp(F v, float lo, float hi) {
    v = v > set1(lo) ? v : set1(lo);
    return v < set1(hi) ? v : set1(hi);
  }

  static void store(float* p, F v) { std::memcpy(p, &v, sizeof(v)); }
  template <class T>
  static void store(T* p, F v) {
    for (int j = 0; j < kWidth; ++j) p[j] = from_float<T>(v[j]);
  }
  template <class T>
  static void store2(T* p, Two v) {
    store(p, v.a), store(p + kWidth, v.b);
  }
  template <class T>
  static void stream2(T* p, Two v) {
    store2(p, v);
  }
  // Floats as they lie in memory, in the order in which load2 brings those of type T, and back: here the same.
  template <class T>
  static Two in_order_of(Two v) {
    return v;
  }
  // swap_pairs of two vectors in that order.
  template <class T>
  static Two swap_pairs2(Two v) {
    return {swap_pairs(v.a), swap_pairs(v.b)};
  }
  template <class T>
  static Two from_order_of(Two v) {
    return v;
  }
  template <class T>
  static void store_tail(T* p, F v, int n) {
    for (int j = 0; j < n; ++j) p[j] = from_float<T>(v[j]);
  }

  static I set1(int32_t value) { return I{value, value, value, value}; }
  static I load(const int32_t* p) { return I{p[0], p[1], p[2], p[3]}; }
  static I load(const int8_t* p) { return I{p[0], p[1], p[2], p[3]}; }
  static I load(const uint8_t* p) { return I{p[0], p[1], p[2], p[3]}; }
  static I load(const int16_t* p) { return I{p[0], p[1], p[2], p[3]}; }
  static I load(const uint16_t* p) { return I{p[0], p[1], p[2], p[3]}; }
  static void store(int32_t* p, I v) { std::memcpy(p, &v, sizeof(v)); }
  static I add(I a, I b) { return a + b; }
  static I sub(I a, I b) { return a - b; }
  static I min(I a, I b) { return a < b ? a : b; }
  static I mul(I a, I b) { return reinterpret_cast<I>(reinterpret_cast<U>(a) * reinterpret_cast<U>(b)); }
  static I bit_and(I a, I b) { return a & b; }
  static I bit_xor(I a, I b) { return a ^ b; }
  template <int n>
  static I shift_left(I v) {
    return v << n;
  }
  // Zeros come in from the left.
  template <int n>
  static I shift_right(I v) {
    return reinterpret_cast<I>(reinterpret_cast<U>(v) >> n);
  }
  static I bits(F v) { return reinterpret_cast<I>(v); }
  static F from_bits(I v) { return reinterpret_cast<F>(v); }
  static F to_float(I v) { return __builtin_convertvector(v, F); }

  static I zero() { return I{}; }
  static I abs_bits(F v) { return reinterpret_cast<I>(v) & 0x7fffffff; }
  static I max(I a, I b) { return a > b ? a : b; }
  static uint32_t reduce_max(I v) {
    return static_cast<uint32_t>(std::max(std::max(v[0], v[1]), std::max(v[2], v[3])));
  }
  // Adding 1.5 * 2^23 leaves the integer nearest to |v| < 2^22, ties to even, in the low bits.
  static I round(F v) { return reinterpret_cast<I>(v + 0x1.8p23f) - 0x4b400000; }
  static I floor(F v) {
    const F nearest = (v + 0x1.8p23f) - 0x1.8p23f;
    return round(v) + (nearest > v);  // a true comparison is -1
  }

  // Towards 0.
  static I truncate(F v) { return __builtin_convertvector(v, I); }
  // magnitude >= 0 towards 0, negated where v is negative; v of 0 goes with a magnitude below 1.
  static I truncate_as(F magnitude, F v) {
    return reinterpret_cast<I>(v) < 0 ? -truncate(magnitude) : truncate(magnitude);
  }

  // v holds values of int8; they are narrowed as they are stored.
  static void store_i8(int8_t* p, I v) {
    for (int j = 0; j < kWidth; ++j) p[j] = static_cast<int8_t>(v[j]);
  }
  static void store_i8_tail(int8_t* p, I v, int n) {
    for (int j = 0; j < n; ++j) p[j] = static_cast<int8_t>(v[j]);
  }

  static void store_i8(int8_t* p, const I (&v)[4]) {
    for (int j = 0; j < 4; ++j) store_i8(p + j * kWidth, v[j]);
  }

  static void store_u8(uint8_t* p, I v) {
    for (int j = 0; j < kWidth; ++j) p[j] = static_cast<uint8_t>(v[j]);
  }
  static void store_u8(uint8_t* p, const I (&v)[4]) {
    for (int j = 0; j < 4; ++j) store_u8(p + j * kWidth, v[j]);
  }
  static void store_u16(uint16_t* p, I v) {
    for (int j = 0; j < kWidth; ++j) p[j] = static_cast<uint16_t>(v[j]);
  }

  static void stream_line(int8_t* p, const int8_t* from) { std::memcpy(p, from, 64); }
  static void fence() {}

  static H zero16() { return H{}; }
  static H abs16(const void* p) {
    H v;
    std::memcpy(&v, p, sizeof(v));
    return v & 0x7fff;
  }
  static H max16(H a, H b) { return a > b ? a : b; }
  static uint32_t reduce_max16(H v) {
    int16_t best = 0;
    for (int j = 0; j < 8; ++j) best = std::max(best, v[j]);
    return static_cast<uint32_t>(best);
  }

  static constexpr int kUniforms = 4;
  static void random_words(uint64_t counter, PhiloxKey key, I (&out)[kUniforms / kWidth]) {
    uint32_t word[4];
    philox4x32(counter, key, word);
    std::memcpy(out, word, sizeof(word));
  }
  static void uniforms(uint64_t counter, PhiloxKey key, float* out) {
    I word[1];
    random_words(counter, key, word);
    store(out, mul(to_float(shift_right<8>(word[0])), set1(kUniformStep)));
  }

  // As in simd_random_avx2.h; every type takes the same order.
  static constexpr int kKept = 8;
  class Kept {
   public:
    Kept(uint64_t seed, uint32_t upper, uint32_t limit) : seed_(seed), upper_(upper), limit_(limit) {}

    template <class T>
    void masks(uint32_t counter, I (&mask)[kKept / kWidth]) const {
      for (uint32_t j = 0; j < 2; ++j) {
        uint32_t word[4];
        philox4x32(static_cast<uint64_t>(upper_) << 32 | (counter + j), {seed_, 0}, word);
        for (int i = 0; i < 4; ++i) mask[j][i] = word[i] >> 8 >= limit_ ? -1 : 0;
      }
    }

   private:
    uint64_t seed_;
    uint32_t upper_, limit_;
  };
  template <class T>
  static Two load2_kept(const T* p, I a, I b) {
    const Two v = load2(p);
    return {reinterpret_cast<F>(reinterpret_cast<I>(v.a) & a), reinterpret_cast<F>(reinterpret_cast<I>(v.b) & b)};
  }
};

}  // namespace
}  // namespace pykernels::cpu
