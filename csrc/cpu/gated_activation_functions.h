// Activations and their derivatives on the vectors of simd_*.h, in registers of float32: to a few ulp for elements of
// type float, to about 2e-5 for f16 and 2e-4 for bf16, a tenth of half an ulp of theirs, with shorter polynomials. NaN
// stays NaN, no input overflows on the way.
#pragma once

#include "../launchers/gated_activation.h"
#include "float_types.h"

namespace pykernels::cpu {
namespace {

template <class S>
struct ValueSlope {
  typename S::F value, slope;
};

template <class T>
inline constexpr bool kExact = std::is_same_v<T, float>;

// The polynomial whose coefficients are given from the highest power down.
template <class S, class... Coefficient>
inline typename S::F polynomial(typename S::F x, float highest, Coefficient... lower) {
  typename S::F p = S::set1(highest);
  ((p = S::fma(p, x, S::set1(lower))), ...);
  return p;
}

// exp(x + more), -87.3 <= x <= 87.3, more being small, to an ulp of float32. The arithmetic is bit twiddling, so x
// outside gives nonsense; NaN gives NaN.
template <class S>
inline typename S::F exp_within(typename S::F x, typename S::F more = S::set1(0.0f)) {
  using F = typename S::F;
  const F shift = S::set1(0x1.8p23f + 127.0f);
  const F low_bits = S::fma(x, S::set1(1.44269504f), shift);
  const F whole = S::sub(low_bits, shift);
  const F r = S::add(S::fma(whole, S::set1(2.12194440e-4f), S::fma(whole, S::set1(-0.693359375f), x)), more);
  const F p = polynomial<S>(r, 0.0013836845755577087f, 0.008374815806746483f, 0.04166822507977486f,
                            0.16666419804096222f, 0.49999991059303284f, 1.0f, 1.0f);
  return S::mul(p, S::power_of_low_bits(low_bits));
}

// scale 2^x, -126 <= x <= 126, scale about 1, for elements of type T of 16 bits: the power of two is added to the
// exponent's bits, since additions have units that products and fma leave idle. NaN gives NaN.
template <class S, class T>
inline typename S::F exp2_within(typename S::F x, float scale = 1.0f) {
  using F = typename S::F;
  const F shift = S::set1(0x1.8p23f), low_bits = S::add(x, shift);
  const F r = S::sub(x, S::sub(low_bits, shift));
  F p;
  if constexpr (std::is_same_v<T, bf16>) {
    p = polynomial<S>(r, scale * 0.05517167f, scale * 0.24261115f, scale * 0.69326099f, scale * 0.99992807f);
  } else {
    p = polynomial<S>(r, scale * 0.0095701f, scale * 0.05591786f, scale * 0.24024745f, scale * 0.69312181f,
                      scale * 0.99999926f);
  }
  return S::from_bits(S::add(S::bits(p), S::template shift_left<23>(S::bits(low_bits))));
}

// exp(scale x) for T, |scale x| <= 87.3.
template <class S, class T>
inline typename S::F exp_scaled(typename S::F x, float scale) {
  if constexpr (kExact<T>) return exp_within<S>(S::mul(x, S::set1(scale)));
  return exp2_within<S, T>(S::mul(x, S::set1(scale * 1.4426950408889634f)));
}

// Limits that keep NaN: the vectors' min and max return their second argument when either is NaN.
template <class S>
inline typename S::F at_most(float limit, typename S::F x) {
  return S::min(S::set1(limit), x);
}
template <class S>
inline typename S::F at_least(float limit, typename S::F x) {
  return S::max(S::set1(limit), x);
}

// x sigmoid(x). Below -87 both are those of -87, whose value is -1e-36.
template <class S, class T>
inline ValueSlope<S> silu(typename S::F x) {
  using F = typename S::F;
  const F one = S::set1(1.0f), above = at_least<S>(-87.0f, x), limited = at_most<S>(87.0f, above);
  const F e = exp_scaled<S, T>(limited, -1.0f);
  const F s = S::div(one, S::add(one, e));
  F rest = S::mul(e, s);  // 1 - s, which cancels where x > 0
  if constexpr (kExact<T>) rest = S::if_less(x, S::set1(0.0f), S::sub(one, s), rest);
  return {S::mul(above, s), S::mul(s, S::fma(limited, rest, one))};
}

// 0.5 x (1 + tanh(u)) = x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3); |2 u| reaches 87 at 9.98.
template <class S, class T>
inline ValueSlope<S> gelu_tanh(typename S::F x) {
  using F = typename S::F;
  constexpr float kLinear = 1.5957691216057308f, kCubic = 0.044715f * 1.5957691216057308f;
  const F one = S::set1(1.0f), above = at_least<S>(-9.98f, x), limited = at_most<S>(9.98f, above);
  const F z = S::mul(limited, limited);
  F e;
  if constexpr (kExact<T>) {
    e = exp_within<S>(S::mul(limited, S::fma(z, S::set1(-kCubic), S::set1(-kLinear))));
  } else {
    constexpr float kLog2E = 1.4426950408889634f;
    e = exp2_within<S, T>(S::mul(limited, S::fma(z, S::set1(-kCubic * kLog2E), S::set1(-kLinear * kLog2E))));
  }
  const F s = S::div(one, S::add(one, e));
  const F slope_of_2u = S::fma(z, S::set1(3 * kCubic), S::set1(kLinear));
  const F rest = S::mul(S::mul(e, s), S::mul(limited, slope_of_2u));
  return {S::mul(above, s), S::fma(s, rest, s)};
}

// Phi(-t) and phi(t).
template <class S>
struct NormalTail {
  typename S::F tail, density;
};
constexpr float kDensityAt0 = 0.3989422804014327f;

// With t >= 0, Phi(-t) = exp(-t^2 / 2) R(t), and (t + c) R(t) is a polynomial in (t - c) / (t + c), fitted on [0, 13.5]
// to 6e-9.
template <class S>
inline NormalTail<S> normal_tail_exact(typename S::F t) {
  using F = typename S::F;
  constexpr float c = 3.5f;
  const F one = S::set1(1.0f), inverse = S::div(one, S::add(t, S::set1(c)));
  const F y = S::fma(inverse, S::set1(-2 * c), one);
  const F p = polynomial<S>(y, 0.00011483321583065996f, 0.0004296163588147446f, -0.0004941458593523282f,
                            -0.0031802705366186204f, 0.006491602936372533f, 0.017407409091918943f, -0.1160527376949811f,
                            0.3154249747480527f, -0.5655617578058487f, 0.7444160750608565f);
  // t = high + low, high of 12 bits: its square is exact, and exp does not see t's rounding 87 times enlarged.
  const F scaled = S::mul(t, S::set1(4097.0f)), high = S::sub(scaled, S::sub(scaled, t)), low = S::sub(t, high);
  const F e =
      exp_within<S>(S::mul(S::mul(high, high), S::set1(-0.5f)), S::mul(S::mul(S::add(t, high), low), S::set1(-0.5f)));
  return {S::mul(S::mul(p, inverse), e), S::mul(e, S::set1(kDensityAt0))};
}

// The same as phi(t) times a polynomial in 1 / (t + c), fitted on [0, 13.2] to 1.4e-5 (f16) and 1e-4 (bf16).
template <class S, class T>
inline NormalTail<S> normal_tail(typename S::F t) {
  using F = typename S::F;
  constexpr bool wide = std::is_same_v<T, bf16>;
  const F inverse = S::div(S::set1(1.0f), S::add(t, S::set1(wide ? 3.5f : 2.75f)));
  F ratio;
  if constexpr (wide) {
    ratio = polynomial<S>(inverse, 109.226448f, -8.81743717f, 5.88965082f, 0.865954399f, 0.00285463617f);
  } else {
    ratio = polynomial<S>(inverse, -38.4206696f, 34.7902298f, 2.40606356f, 3.1500988f, 0.980869472f, 0.000356899604f);
  }
  const F density = exp2_within<S, T>(S::mul(t, S::mul(t, S::set1(-0.7213475204444817f))), kDensityAt0);
  return {S::mul(ratio, density), density};
}

// x Phi(x), by Phi(-|x|). Beyond 13.19 exp(-t^2 / 2) is below 1e-38.
template <class S, class T>
inline ValueSlope<S> gelu(typename S::F x) {
  using F = typename S::F;
  const F one = S::set1(1.0f), zero = S::set1(0.0f), t = at_most<S>(13.19f, S::abs(x));
  NormalTail<S> at;
  if constexpr (kExact<T>) {
    at = normal_tail_exact<S>(t);
  } else {
    at = normal_tail<S, T>(t);
  }
  const F minus_t = S::negate(t);
  // The slope at -t is Phi(-t) - t phi(t); those at t and -t add up to 1.
  const F slope = S::fma(minus_t, at.density, at.tail);
  return {S::fma(minus_t, at.tail, S::max(zero, x)), S::if_negative(x, slope, S::sub(one, slope))};
}

template <class S, GatedActivation A, class T>
inline ValueSlope<S> activation(typename S::F x) {
  using F = typename S::F;
  if constexpr (A == GatedActivation::silu) return silu<S, T>(x);
  if constexpr (A == GatedActivation::gelu) return gelu<S, T>(x);
  if constexpr (A == GatedActivation::gelu_tanh) return gelu_tanh<S, T>(x);
  const F positive = S::max(S::set1(0.0f), x);
  if constexpr (A == GatedActivation::relu2) return {S::mul(positive, positive), S::add(positive, positive)};
  return {positive, S::keep_nan(x, S::if_less(S::set1(0.0f), x, S::set1(1.0f), S::set1(0.0f)))};
}

}  // namespace
}  // namespace pykernels::cpu
