// Elementary functions on the vectors of simd_*.h: exp, log, sigmoid and tanh, to about 2 ulp of float32.
// Include it after a simd_*.h; polynomials after Cephes (Moshier, expf, logf and tanhf).
#pragma once

namespace pykernels::cpu {
namespace {

// exp(x): 0 below -86.6 (about the smallest normal number), infinity above 88.7, NaN for NaN.
template <class S>
inline typename S::F exp(typename S::F x) {
  using F = typename S::F;
  const F limited = S::max(S::min(x, S::set1(88.72284f)), S::set1(-86.6434f));
  // Two factors of 2^n, because n = 128 has no float of its own.
  const auto n = S::round(S::mul(limited, S::set1(1.44269504f)));
  const F whole = S::to_float(n);
  F r = S::fma(whole, S::set1(-0.693359375f), limited);
  r = S::fma(whole, S::set1(2.12194440e-4f), r);
  F p = S::set1(1.9875691500e-4f);
  p = S::fma(p, r, S::set1(1.3981999507e-3f));
  p = S::fma(p, r, S::set1(8.3334519073e-3f));
  p = S::fma(p, r, S::set1(4.1665795894e-2f));
  p = S::fma(p, r, S::set1(1.6666665459e-1f));
  p = S::fma(p, r, S::set1(5.0000001201e-1f));
  p = S::add(S::fma(S::mul(r, r), p, r), S::set1(1.0f));
  F y = S::mul(S::mul(p, S::power_of_two(S::sub(n, S::set1(1)))), S::set1(2.0f));
  y = S::if_less(x, S::set1(-86.6434f), S::set1(0.0f), y);
  y = S::if_less(S::set1(88.72284f), x, S::set1(__builtin_inff()), y);
  return S::keep_nan(x, y);
}

// log(x) of positive finite normal numbers, exact at 1; NaN for NaN.
template <class S>
inline typename S::F log(typename S::F x) {
  using F = typename S::F;
  // x = m * 2^n with m in [sqrt(1/2), sqrt(2)), in two factors because -n may be 127.
  const auto n = S::exponent(S::mul(x, S::set1(1.41421356f)));
  const F m = S::mul(S::mul(x, S::set1(0.5f)), S::power_of_two(S::sub(S::set1(1), n)));
  const F whole = S::to_float(n), f = S::sub(m, S::set1(1.0f)), z = S::mul(f, f);
  F p = S::set1(7.0376836292e-2f);
  p = S::fma(p, f, S::set1(-1.1514610310e-1f));
  p = S::fma(p, f, S::set1(1.1676998740e-1f));
  p = S::fma(p, f, S::set1(-1.2420140846e-1f));
  p = S::fma(p, f, S::set1(1.4249322787e-1f));
  p = S::fma(p, f, S::set1(-1.6668057665e-1f));
  p = S::fma(p, f, S::set1(2.0000714765e-1f));
  p = S::fma(p, f, S::set1(-2.4999993993e-1f));
  p = S::fma(p, f, S::set1(3.3333331174e-1f));
  p = S::mul(S::mul(p, f), z);
  p = S::fma(whole, S::set1(-2.12194440e-4f), p);
  p = S::fma(z, S::set1(-0.5f), p);
  return S::keep_nan(x, S::fma(whole, S::set1(0.693359375f), S::add(f, p)));
}

// 1 / (1 + exp(-x)), with exp(-|x|) so that neither tail overflows or cancels.
template <class S>
inline typename S::F sigmoid(typename S::F x) {
  using F = typename S::F;
  const F one = S::set1(1.0f), zero = S::set1(0.0f);
  const F e = exp<S>(S::sub(zero, S::abs(x)));
  return S::div(S::if_less(x, zero, e, one), S::add(one, e));
}

template <class S>
inline typename S::F tanh(typename S::F x) {
  using F = typename S::F;
  const F a = S::abs(x), z = S::mul(x, x);
  F p = S::set1(-5.70498872745e-3f);
  p = S::fma(p, z, S::set1(2.06390887954e-2f));
  p = S::fma(p, z, S::set1(-5.37397155531e-2f));
  p = S::fma(p, z, S::set1(1.33314422036e-1f));
  p = S::fma(p, z, S::set1(-3.33332819422e-1f));
  const F small = S::fma(S::mul(p, z), x, x);
  const F e = exp<S>(S::add(a, a));
  const F large = S::sub(S::set1(1.0f), S::div(S::set1(2.0f), S::add(e, S::set1(1.0f))));
  return S::if_less(a, S::set1(0.625f), small, S::keep_nan(x, S::copy_sign(large, x)));
}

}  // namespace
}  // namespace pykernels::cpu
