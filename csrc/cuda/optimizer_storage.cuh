// Eight neighbours of a parameter, gradient or state, read and rounded: pykernels/ops/_optimizer_codes.py on the
// device.
#pragma once

#include <type_traits>

#include "optimizer_rules.cuh"

namespace pykernels::cuda {

constexpr float kTiny = 0x1p-100f;

// `count` of 8 elements from `at` on as W, zeros beyond. kVector: all 8, on 16 bytes (8 for codes).
template <typename W, typename T>
__device__ __forceinline__ void load_each(const void* source, int64_t at, int count, W (&out)[kLane]) {
  const T* x = static_cast<const T*>(source) + at;
#pragma unroll
  for (int i = 0; i < kLane; ++i) {
    if constexpr (sizeof(T) == 2 && !std::is_integral_v<T>) {
      out[i] = i < count ? static_cast<W>(to_float(x[i])) : W(0);
    } else {
      out[i] = i < count ? static_cast<W>(x[i]) : W(0);
    }
  }
}

template <typename W>
__device__ __forceinline__ void load_eight(const void* source, Kind kind, int64_t at, int count, bool vector,
                                           W (&out)[kLane]) {
  if (kind == Kind::f64) return load_each<W, double>(source, at, count, out);
  if (kind == Kind::f32) {
    if (!vector) return load_each<W, float>(source, at, count, out);
    float low[4], high[4];
    const char* bytes = static_cast<const char*>(source) + at * 4;
    unpack(load16(bytes), low, 0.0f);
    unpack(load16(bytes + 16), high, 0.0f);
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = static_cast<W>(low[i]), out[i + 4] = static_cast<W>(high[i]);
    return;
  }
  if (kind == Kind::i8 || kind == Kind::u8) {
    if (!vector) {
      if (kind == Kind::i8) return load_each<W, int8_t>(source, at, count, out);
      return load_each<W, uint8_t>(source, at, count, out);
    }
    const Vec8 v = load8(static_cast<const char*>(source) + at);
#pragma unroll
    for (int i = 0; i < kLane; ++i) {
      const uint32_t byte = (v.word[i / 4] >> (8 * (i % 4))) & 0xffu;
      out[i] = kind == Kind::i8 ? static_cast<W>(static_cast<int8_t>(byte)) : static_cast<W>(byte);
    }
    return;
  }
  if (!vector) {
    if (kind == Kind::bf16) return load_each<W, BFloat16>(source, at, count, out);
    if (kind == Kind::f16) return load_each<W, Half>(source, at, count, out);
    return load_each<W, int16_t>(source, at, count, out);
  }
  const Vec16 v = load16(static_cast<const char*>(source) + at * 2);
#pragma unroll
  for (int i = 0; i < kLane; ++i) {
    const auto bits = static_cast<uint16_t>(v.word[i / 2] >> (16 * (i % 2)));
    out[i] = static_cast<W>(kind == Kind::bf16  ? to_float(BFloat16{bits})
                            : kind == Kind::f16 ? to_float(Half{bits})
                                                : static_cast<float>(static_cast<int16_t>(bits)));
  }
}

__device__ __forceinline__ void store_sixteens(void* target, int64_t at, int count, bool vector,
                                               const uint32_t (&bits)[kLane]) {
  uint16_t* out = static_cast<uint16_t*>(target) + at;
  if (vector) {
    Vec16 v;
#pragma unroll
    for (int i = 0; i < 4; ++i) v.word[i] = bits[2 * i] | bits[2 * i + 1] << 16;
    return store16_global(out, v);
  }
#pragma unroll
  for (int i = 0; i < kLane; ++i) {
    if (i < count) out[i] = static_cast<uint16_t>(bits[i]);
  }
}

template <typename W>
__device__ __forceinline__ void store_wide(void* target, int64_t at, int count, bool vector, const W (&v)[kLane]) {
  W* out = static_cast<W*>(target) + at;
  if constexpr (sizeof(W) == 4) {
    if (vector) {
      Vec16 low, high;
#pragma unroll
      for (int i = 0; i < 4; ++i) low.word[i] = float_to_bits(v[i]), high.word[i] = float_to_bits(v[i + 4]);
      store16_global(out, low);
      return store16_global(out + 4, high);
    }
  }
#pragma unroll
  for (int i = 0; i < kLane; ++i) {
    if (i < count) out[i] = v[i];
  }
}

// float32 rounded up with the probability of its fraction; random: 16 bits.
__device__ __forceinline__ uint32_t truncate_to_bfloat16(float v, uint32_t random) {
  const uint32_t bits = float_to_bits(v);
  return (bits & 0x7fffffffu) < 0x7f800000u ? (bits + random) >> 16 : float_to_bfloat16(v);
}

// The Weyl word of element 0; element i has i * kWeyl more.
constexpr uint32_t kWeyl = 0x85ebca6bu;
__device__ __forceinline__ uint32_t dither_base(uint32_t step, uint32_t stream, uint64_t seed) {
  return step * 0x9e3779b1u + stream * 0xc2b2ae35u + static_cast<uint32_t>(seed) * 0x27d4eb2fu;
}

__device__ __forceinline__ uint32_t mix(uint32_t x, uint32_t key) {
  x = ((x ^ x >> 16) * 0x7feb352du) ^ key;
  return (x ^ x >> 15) * 0x846ca68bu;
}

// 16 random bits for each of the 8 elements from index on: pykernels/ops/_optimizer_codes.py's random_bits.
__device__ __forceinline__ void random_sixteens(int64_t index, uint32_t step, uint32_t stream, uint64_t seed,
                                                uint32_t (&out)[kLane]) {
  const uint32_t base = dither_base(step, stream, seed), mixed = mix(base, 0), key = mixed ^ mixed >> 16;
#pragma unroll
  for (int i = 0; i < kLane; ++i) out[i] = mix(base + (static_cast<uint32_t>(index) + i) * kWeyl, key) >> 16;
}

// What codes are multiplied by, and what values are multiplied by to become codes.
__device__ __forceinline__ float code_step(float scale, Kind kind) {
  return __fdiv_rn(scale, kind == Kind::i8 ? 16129.0f : 255.0f);
}

template <typename W>
__device__ __forceinline__ W decode(W code, float step, Kind kind) {
  const float c = static_cast<float>(code);
  if (kind == Kind::i8) return static_cast<W>(__fmul_rn(__fmul_rn(c, fabsf(c)), step));
  const float v = __fmul_rn(c, step);
  return static_cast<W>(__fmul_rn(v, v));
}

// The part of a moment that its scale is the maximum of.
__device__ __forceinline__ float code_size(float v, Kind kind) { return kind == Kind::i8 ? fabsf(v) : __fsqrt_rn(v); }

struct CodeScale {
  float scale, inverse;
};
__device__ __forceinline__ CodeScale code_scale(uint32_t top, Kind kind) {
  const float scale = bits_to_float(top);
  const bool usable = top < 0x7f800000u && scale >= kTiny;
  return {scale < kTiny ? 0.0f : scale, usable ? __fdiv_rn(kind == Kind::i8 ? 16129.0f : 255.0f, scale) : 0.0f};
}

__device__ __forceinline__ uint32_t encode(float v, float inverse, uint32_t dither, Kind kind) {
  float exact = inverse == 0.0f ? 0.0f : __fmul_rn(code_size(v, kind), inverse);
  const float u = uniform(dither);
  if (kind == Kind::i8) {
    exact = __fsqrt_rn(exact);
    const int code = static_cast<int>(fminf(floorf(__fadd_rn(exact, u)), 127.0f));
    return static_cast<uint32_t>(v < 0.0f ? -code : code) & 0xffu;
  }
  const int code = static_cast<int>(fminf(floorf(__fadd_rn(exact, u)), 255.0f));
  return static_cast<uint32_t>(exact > 0.0f ? max(code, 1) : code);
}

__device__ __forceinline__ void store_codes(void* target, int64_t at, int count, bool vector,
                                            const uint32_t (&code)[kLane]) {
  uint8_t* out = static_cast<uint8_t*>(target) + at;
  if (vector) {
    uint32_t word[2] = {};
#pragma unroll
    for (int i = 0; i < kLane; ++i) word[i / 4] |= code[i] << (8 * (i % 4));
    return store8(out, word[0], word[1]);
  }
#pragma unroll
  for (int i = 0; i < kLane; ++i) {
    if (i < count) out[i] = static_cast<uint8_t>(code[i]);
  }
}

}  // namespace pykernels::cuda
