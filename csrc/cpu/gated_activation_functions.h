// Activations and their derivatives on the vectors of simd_*.h. Exact: to a few ulp of float32; otherwise to about
// 2e-5, a tenth of half an ulp of fp16, with shorter polynomials. NaN stays NaN, no input overflows on the way.
#pragma once

#include "../launchers/gated_activation.h"

namespace pykernels::cpu {
namespace {

template <class S>
struct ValueSlope {
  typename S::F value, slope;
};

// exp(x + more), -87.3 <= x <= 87.3, more being small and counted by Exact alone. The arithmetic is bit twiddling, so x
// outside gives nonsense; NaN gives NaN.
template <class S, bool Exact>
inline typename S::F exp_within(typename S::F x, typename S::F more = S::set1(0.0f)) {
  using F = typename S::F;
  const F shift = S::set1(0x1.8p23f + 127.0f);
  const F low_bits = S::fma(x, S::set1(1.44269504f), shift);
  const F whole = S::sub(low_bits, shift);
  F r, p;
  if constexpr (Exact) {
    r = S::fma(whole, S::set1(-0.693359375f), x);
    r = S::add(S::fma(whole, S::set1(2.12194440e-4f), r), more);
    p = S::set1(0.0013836845755577087f);
    p = S::fma(p, r, S::set1(0.008374815806746483f));
    p = S::fma(p, r, S::set1(0.04166822507977486f));
    p = S::fma(p, r, S::set1(0.16666419804096222f));
    p = S::fma(p, r, S::set1(0.49999991059303284f));
    p = S::fma(p, r, S::set1(1.0f));
    p = S::fma(p, r, S::set1(1.0f));
  } else {
    r = S::fma(whole, S::set1(-0.69314718f), x);
    p = S::set1(0.04145860905894434f);
    p = S::fma(p, r, S::set1(0.16790907957058823f));
    p = S::fma(p, r, S::set1(0.5000435869581389f));
    p = S::fma(p, r, S::set1(0.999963404419044f));
    p = S::fma(p, r, S::set1(0.9999992614340213f));
  }
  return S::mul(p, S::power_of_low_bits(low_bits));
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
template <class S, bool Exact>
inline ValueSlope<S> silu(typename S::F x) {
  using F = typename S::F;
  const F one = S::set1(1.0f), above = at_least<S>(-87.0f, x), limited = at_most<S>(87.0f, above);
  const F e = exp_within<S, Exact>(S::sub(S::set1(0.0f), limited));
  const F s = S::div(one, S::add(one, e));
  F rest = S::mul(e, s);  // 1 - s, which cancels where x > 0
  if constexpr (Exact) rest = S::if_less(x, S::set1(0.0f), S::sub(one, s), rest);
  return {S::mul(above, s), S::mul(s, S::fma(limited, rest, one))};
}

// 0.5 x (1 + tanh(u)) = x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3); |2 u| reaches 87 at 9.98.
template <class S, bool Exact>
inline ValueSlope<S> gelu_tanh(typename S::F x) {
  using F = typename S::F;
  constexpr float kLinear = 1.5957691216057308f, kCubic = 0.044715f * 1.5957691216057308f;
  const F one = S::set1(1.0f), above = at_least<S>(-9.98f, x), limited = at_most<S>(9.98f, above);
  const F z = S::mul(limited, limited);
  const F e = exp_within<S, Exact>(S::mul(limited, S::fma(z, S::set1(-kCubic), S::set1(-kLinear))));
  const F s = S::div(one, S::add(one, e));
  const F slope_of_2u = S::fma(z, S::set1(3 * kCubic), S::set1(kLinear));
  const F rest = S::mul(S::mul(e, s), S::mul(limited, slope_of_2u));
  return {S::mul(above, s), S::fma(s, rest, s)};
}

// x Phi(x). With t = |x|, Phi(-t) = exp(-t^2 / 2) R(t), and (t + c) R(t) is a polynomial in (t - c) / (t + c), fitted
// on [0, 13.5] to 6e-9 (Exact) and 2e-5. Beyond 13.19 exp(-t^2 / 2) is below 1e-38.
template <class S, bool Exact>
inline ValueSlope<S> gelu(typename S::F x) {
  using F = typename S::F;
  const F one = S::set1(1.0f), zero = S::set1(0.0f), t = at_most<S>(13.19f, S::abs(x));
  F p, e;
  constexpr float c = Exact ? 3.5f : 3.0f;
  const F inverse = S::div(one, S::add(t, S::set1(c)));
  const F y = S::fma(inverse, S::set1(-2 * c), one);
  if constexpr (Exact) {
    p = S::set1(0.00011483321583065996f);
    p = S::fma(p, y, S::set1(0.0004296163588147446f));
    p = S::fma(p, y, S::set1(-0.0004941458593523282f));
    p = S::fma(p, y, S::set1(-0.0031802705366186204f));
    p = S::fma(p, y, S::set1(0.006491602936372533f));
    p = S::fma(p, y, S::set1(0.017407409091918943f));
    p = S::fma(p, y, S::set1(-0.1160527376949811f));
    p = S::fma(p, y, S::set1(0.3154249747480527f));
    p = S::fma(p, y, S::set1(-0.5655617578058487f));
    p = S::fma(p, y, S::set1(0.7444160750608565f));
    // t = high + low, high of 12 bits: its square is exact, and exp does not see t's rounding 87 times enlarged.
    const F scaled = S::mul(t, S::set1(4097.0f)), high = S::sub(scaled, S::sub(scaled, t)), low = S::sub(t, high);
    e = exp_within<S, Exact>(S::mul(S::mul(high, high), S::set1(-0.5f)),
                             S::mul(S::mul(S::add(t, high), low), S::set1(-0.5f)));
  } else {
    p = S::set1(0.004885707848284743f);
    p = S::fma(p, y, S::set1(-0.009889986100632074f));
    p = S::fma(p, y, S::set1(-0.04634075583294804f));
    p = S::fma(p, y, S::set1(0.2298967789034747f));
    p = S::fma(p, y, S::set1(-0.5094233868234356f));
    p = S::fma(p, y, S::set1(0.729089193810231f));
    e = exp_within<S, Exact>(S::mul(t, S::mul(t, S::set1(-0.5f))));
  }
  const F tail = S::mul(S::mul(p, inverse), e);  // Phi(-t)
  const F minus_t = S::sub(zero, t);
  // The slope at -t is Phi(-t) - t phi(t); those at t and -t add up to 1.
  const F slope = S::fma(S::mul(minus_t, S::set1(0.3989422804014327f)), e, tail);
  return {S::fma(minus_t, tail, S::max(zero, x)), S::if_less(zero, x, S::sub(one, slope), slope)};
}

template <class S, GatedActivation A, bool Exact>
inline ValueSlope<S> activation(typename S::F x) {
  using F = typename S::F;
  if constexpr (A == GatedActivation::silu) return silu<S, Exact>(x);
  if constexpr (A == GatedActivation::gelu) return gelu<S, Exact>(x);
  if constexpr (A == GatedActivation::gelu_tanh) return gelu_tanh<S, Exact>(x);
  const F positive = S::max(S::set1(0.0f), x);
  if constexpr (A == GatedActivation::relu2) return {S::mul(positive, positive), S::add(positive, positive)};
  return {positive, S::keep_nan(x, S::if_less(S::set1(0.0f), x, S::set1(1.0f), S::set1(0.0f)))};
}

}  // namespace
}  // namespace pykernels::cpu
