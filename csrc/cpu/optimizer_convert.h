// What is not float32 goes through a short float32 buffer: gradients, 16-bit parameters with what rounding took from
// them, bfloat16 state. n is at most kPiece; buffers have room for a whole last vector.
#pragma once

#include "../launchers/optimizer.h"

namespace pykernels::cpu {
namespace {

constexpr int kPiece = 256;

constexpr uint32_t kWeylStep = 0x85EBCA6Bu;

// 32 random bits of an element's state: a Weyl sequence along the index (_optimizer_codes.dither_bits).
inline uint32_t dither_base(const OptimizerTensor& tensor, uint64_t seed, int64_t index) {
  return tensor.step * 0x9E3779B1u + tensor.stream * 0xC2B2AE35u + static_cast<uint32_t>(seed) * 0x27D4EB2Fu +
         static_cast<uint32_t>(index) * kWeylStep;
}

// The multiples of the Weyl sequence that a vector's elements add.
struct WeylLanes {
  alignas(64) int32_t lane[16];
  constexpr WeylLanes() : lane() {
    for (int j = 0; j < 16; ++j) lane[j] = static_cast<int32_t>(static_cast<uint32_t>(j) * kWeylStep);
  }
};
inline constexpr WeylLanes kWeyl;

template <class S>
struct Dither {
  typename S::I word;

  Dither() = default;
  Dither(const OptimizerTensor& tensor, uint64_t seed, int64_t index)
      : word(S::add(S::load(kWeyl.lane), S::set1(static_cast<int32_t>(dither_base(tensor, seed, index))))) {}
  // Those of the next vector of elements.
  typename S::I next() {
    const typename S::I current = word;
    word = S::add(word, S::set1(static_cast<int32_t>(static_cast<uint32_t>(S::kWidth) * kWeylStep)));
    return current;
  }
  // Those of the next two vectors, even elements before odd ones or half after half, and n elements go by.
  template <bool even_odd, int n>
  typename S::TwoI next_pair() {
    const typename S::I a = even_odd ? S::add(word, S::load(kWeyl.lane)) : word;
    word = S::add(word, S::set1(static_cast<int32_t>(static_cast<uint32_t>(n) * kWeylStep)));
    return {a, S::add(a, S::set1(static_cast<int32_t>(even_odd ? kWeylStep : S::kWidth * kWeylStep)))};
  }
  // Their upper 24 bits as a whole number.
  typename S::F next_float() { return S::to_float(S::template shift_right<8>(next())); }
};

// What tells the random bits of two steps, tensors or seeds apart (_optimizer_codes.random_key).
inline uint32_t param_key(const OptimizerTensor& tensor, uint64_t seed) {
  uint32_t x = dither_base(tensor, seed, 0);
  x = (x ^ x >> 16) * 0x7FEB352Du;
  x = (x ^ x >> 15) * 0x846CA68Bu;
  return x ^ x >> 16;
}

// 16 random bits for the rounding of parameters, from the words of their dither (_optimizer_codes.random_bits).
template <class S>
inline typename S::I param_bits(typename S::I word, typename S::I key) {
  using I = typename S::I;
  I x = S::mul(S::bit_xor(word, S::template shift_right<16>(word)), S::set1(0x7FEB352D));
  x = S::bit_xor(x, key);
  x = S::mul(S::bit_xor(x, S::template shift_right<15>(x)), S::set1(static_cast<int32_t>(0x846CA68Bu)));
  return S::template shift_right<16>(x);
}

// Calls vector(k) for each whole vector of n elements, then part(k, rest).
template <class S, class Vector, class Part>
inline __attribute__((always_inline)) void each_vector(int n, const Vector& vector, const Part& part) {
  int k = 0;
  for (; k + S::kWidth <= n; k += S::kWidth) vector(k);
  if (k < n) part(k, n - k);
}

template <class S, class T>
void widen_from(const T* from, int n, float* to) {
  each_vector<S>(
      n, [&](int k) { S::store(to + k, S::load(from + k)); },
      [&](int k, int rest) { S::store(to + k, S::load_tail(from + k, rest)); });
}

// from[offset ...] as float32: where it lies, or in the buffer.
template <class S>
const float* widen(const void* from, DType dtype, int64_t offset, int n, float* buffer) {
  switch (dtype) {
    case DType::f32:
      return static_cast<const float*>(from) + offset;
    case DType::bf16:
      widen_from<S>(static_cast<const bf16*>(from) + offset, n, buffer);
      break;
    case DType::f16:
      widen_from<S>(static_cast<const f16*>(from) + offset, n, buffer);
      break;
    default:
      for (int k = 0; k < n; ++k) buffer[k] = static_cast<float>(static_cast<const double*>(from)[offset + k]);
  }
  return buffer;
}

template <class S, class T>
void narrow_to(const float* from, int n, T* to) {
  each_vector<S>(
      n, [&](int k) { S::store(to + k, S::load(from + k)); },
      [&](int k, int rest) { S::store_tail(to + k, S::load(from + k), rest); });
}

// n integers of 16 bits, at most a vector.
template <class S, class T>
inline typename S::I load_16(const T* from, int n) {
  if (n == S::kWidth) return S::load(from);
  T padded[S::kWidth] = {};
  std::memcpy(padded, from, n * sizeof(T));
  return S::load(padded);
}

// The low halves of n words.
template <class S>
inline void store_16(void* to, typename S::I words, int n) {
  if (n == S::kWidth) return S::store_u16(static_cast<uint16_t*>(to), words);
  uint16_t padded[S::kWidth];
  S::store_u16(padded, words);
  std::memcpy(to, padded, n * sizeof(uint16_t));
}

// v with 16 random bits added, so that its upper half is rounded up with the probability of its fraction.
template <class S>
inline typename S::I add_random(typename S::F v, typename S::I bits) {
  return S::add(S::bits(S::number_or(v, S::from_bits(S::set1(0x7fc00000)))), bits);
}

// bfloat16 of v.
template <class S>
inline typename S::I round_stochastic(typename S::F v, typename S::I bits) {
  return S::template shift_right<16>(add_random<S>(v, bits));
}

// 16 bits of each of n elements, at most kPiece.
template <class S>
void random_bits(const OptimizerRule& rule, const OptimizerTensor& tensor, int64_t index, int n, uint16_t* out) {
  const auto key = S::set1(static_cast<int32_t>(param_key(tensor, rule.seed)));
  Dither<S> dither(tensor, rule.seed, index);
  for (int k = 0; k < n; k += S::kWidth) S::store_u16(out + k, param_bits<S>(dither.next(), key));
}

// The parameter in float32 with what its rounding took away; where it is plain float32, where it lies.
template <class S>
float* read_param(const OptimizerRule& rule, const OptimizerTensor& tensor, int64_t offset, int n, float* buffer) {
  if (rule.rounding == Rounding::split_master) {
    const uint16_t* high = static_cast<const uint16_t*>(tensor.param) + offset;
    const int16_t* low = static_cast<const int16_t*>(tensor.extra) + offset;
    for (int k = 0; k < n; k += S::kWidth) {
      const int rest = std::min(S::kWidth, n - k);
      const auto upper = S::template shift_left<16>(load_16<S>(high + k, rest));
      S::store(buffer + k, S::from_bits(S::add(upper, load_16<S>(low + k, rest))));
    }
    return buffer;
  }
  const float* p = widen<S>(tensor.param, rule.param_dtype, offset, n, buffer);
  if (rule.rounding != Rounding::kahan) return const_cast<float*>(p);
  float lost[kPiece];
  const float* extra = widen<S>(tensor.extra, rule.param_dtype, offset, n, lost);
  each_vector<S>(
      n, [&](int k) { S::store(buffer + k, S::add(S::load(p + k), S::load(extra + k))); },
      [&](int k, int rest) { S::store(buffer + k, S::add(S::load_tail(p + k, rest), S::load_tail(extra + k, rest))); });
  return buffer;
}

template <class S, class T>
void write_kahan(const float* value, int n, T* param, T* extra) {
  float lost[kPiece];
  narrow_to<S>(value, n, param);
  each_vector<S>(
      n, [&](int k) { S::store(lost + k, S::sub(S::load(value + k), S::load(param + k))); },
      [&](int k, int rest) { S::store(lost + k, S::sub(S::load(value + k), S::load_tail(param + k, rest))); });
  narrow_to<S>(lost, n, extra);
}

// Rounds what read_param's buffer holds after the step.
template <class S>
void write_param(const OptimizerRule& rule, const OptimizerTensor& tensor, int64_t offset, int64_t index, int n,
                 const float* value) {
  const auto at = [&]<class T>(void* data, T*) { return static_cast<T*>(data) + offset; };
  const auto typed = [&](const auto& write) {
    if (rule.param_dtype == DType::f32) return write(static_cast<float*>(nullptr));
    rule.param_dtype == DType::bf16 ? write(static_cast<bf16*>(nullptr)) : write(static_cast<f16*>(nullptr));
  };
  if (rule.rounding == Rounding::kahan) {
    typed([&](auto* type) { write_kahan<S>(value, n, at(tensor.param, type), at(tensor.extra, type)); });
  } else if (rule.rounding == Rounding::split_master) {
    uint16_t *high = static_cast<uint16_t*>(tensor.param) + offset,
             *low = static_cast<uint16_t*>(tensor.extra) + offset;
    for (int k = 0; k < n; k += S::kWidth) {
      const int rest = std::min(S::kWidth, n - k);
      const auto raw = S::bits(S::load(value + k));
      store_16<S>(high + k, S::template shift_right<16>(S::add(raw, S::set1(0x8000))), rest);
      store_16<S>(low + k, S::bit_and(raw, S::set1(0xffff)), rest);
    }
  } else if (rule.rounding == Rounding::stochastic && rule.param_dtype == DType::bf16) {
    alignas(64) uint16_t random[kPiece];
    random_bits<S>(rule, tensor, index, n, random);
    uint16_t* out = static_cast<uint16_t*>(tensor.param) + offset;
    for (int k = 0; k < n; k += S::kWidth) {
      const auto words = round_stochastic<S>(S::load(value + k), S::load(random + k));
      store_16<S>(out + k, words, std::min(S::kWidth, n - k));
    }
  } else if (rule.param_dtype != DType::f32) {
    typed([&](auto* type) { narrow_to<S>(value, n, at(tensor.param, type)); });
  }
}

// bfloat16 state, rounded with the dither of its elements.
template <class S>
void write_bf16_state(const OptimizerRule& rule, const OptimizerTensor& tensor, int64_t offset, int64_t index, int n,
                      const float* value, void* state) {
  Dither<S> dither(tensor, rule.seed, index);
  uint16_t* out = static_cast<uint16_t*>(state) + offset;
  for (int k = 0; k < n; k += S::kWidth) {
    const auto words = round_stochastic<S>(S::load(value + k), S::template shift_right<16>(dither.next()));
    store_16<S>(out + k, words, std::min(S::kWidth, n - k));
  }
}

}  // namespace
}  // namespace pykernels::cpu
