// The update rules on vectors: the products, sums, quotients and roots of _optimizer_reference.py in its order, none
// of them fused.
#pragma once

#include "../launchers/optimizer.h"

namespace pykernels::cpu {
namespace {

// A coefficient, computed in double, rounded once to the width of the vectors.
template <class S>
inline typename S::F all(double value) {
  if constexpr (sizeof(typename S::F) == sizeof(double)) {
    return value;
  } else {
    return S::set1(static_cast<float>(value));
  }
}

template <class S>
struct Rule {
  using F = typename S::F;

  bool maximize, coupled, decoupled, amsgrad, nesterov, momentum, centered, scaled, first;
  F beta1, rest1, beta2, rest2, eps, weight_decay, grad_scale, root, direction, length, decay;

  Rule(const OptimizerRule& rule, const OptimizerTensor& tensor) {
    const auto flag = [&](int bit) { return (rule.flags & bit) != 0; };
    const bool decays = rule.weight_decay != 0.0, lamb = rule.algorithm == Algorithm::lamb;
    const bool lion = rule.algorithm == Algorithm::lion, adam = rule.algorithm == Algorithm::adam;
    maximize = flag(kMaximize), amsgrad = flag(kAmsgrad), nesterov = flag(kNesterov), momentum = flag(kMomentum);
    centered = flag(kCentered);
    coupled = decays && !flag(kDecoupled) && !lamb && !lion;
    decoupled = decays && (lion || (adam && flag(kDecoupled)));
    scaled = rule.grad_scale != 1.0;
    first = tensor.step == 1;
    beta1 = all<S>(rule.beta1), rest1 = all<S>(1.0 - rule.beta1);
    beta2 = all<S>(rule.beta2), rest2 = all<S>(1.0 - rule.beta2);
    eps = all<S>(rule.eps), weight_decay = all<S>(rule.weight_decay), grad_scale = all<S>(rule.grad_scale);
    root = all<S>(tensor.root), direction = all<S>(tensor.direction);
    length = all<S>(tensor.length), decay = all<S>(tensor.decay);
  }
};

// The larger one, NaN if either is.
template <class S>
inline typename S::F nan_max(typename S::F a, typename S::F b) {
  return S::keep_nan(a, S::keep_nan(b, S::max(a, b)));
}

// Whether a state can be negative: first moments, momenta and means can.
constexpr bool slot_is_signed(Algorithm algorithm, int slot) {
  const bool second = algorithm == Algorithm::adagrad || algorithm == Algorithm::rmsprop;
  return second ? slot > 0 : slot == 0;
}

// What plain steps of many models do without.
template <class S>
inline bool is_plain(const Rule<S>& r) {
  return !(r.scaled || r.maximize || r.coupled || r.amsgrad || r.nesterov || r.centered || r.first);
}

// The direction; `states` gives and takes the states' vectors: load<slot>() and store<slot>(vector). plain: is_plain
// holds, so that nothing is asked in the inner loop.
template <class S, Algorithm A, bool plain, class States>
inline __attribute__((always_inline)) typename S::F advance(const Rule<S>& r, typename S::F p, typename S::F g,
                                                            const States& states) {
  using F = typename S::F;
  const auto load = [&]<int slot>(std::integral_constant<int, slot>) { return states.template load<slot>(); };
  const auto store = [&]<int slot>(std::integral_constant<int, slot>, F v) { states.template store<slot>(v); };
  constexpr std::integral_constant<int, 0> s0;
  constexpr std::integral_constant<int, 1> s1;
  constexpr std::integral_constant<int, 2> s2;
  if (!plain && r.scaled) g = S::div(g, r.grad_scale);
  if (!plain && r.maximize) g = S::negate(g);
  if (!plain && A != Algorithm::lamb && A != Algorithm::lion && r.coupled) g = S::add(g, S::mul(p, r.weight_decay));
  if constexpr (A == Algorithm::adam || A == Algorithm::lamb) {
    F m = load(s0), v = load(s1);
    m = S::add(m, S::mul(S::sub(g, m), r.rest1));
    v = S::add(S::mul(v, r.beta2), S::mul(S::mul(g, g), r.rest2));
    store(s0, m), store(s1, v);
    if (!plain && r.amsgrad) store(s2, v = nan_max<S>(load(s2), v));
    const F u = S::div(m, S::add(S::mul(S::sqrt(v), r.root), r.eps));
    return A == Algorithm::adam ? u : S::add(S::mul(u, r.direction), S::mul(p, r.weight_decay));
  } else if constexpr (A == Algorithm::lion) {
    const F m = load(s0), zero = S::set1(0.0f), one = S::set1(1.0f);
    const F u = S::add(S::mul(m, r.beta1), S::mul(g, r.rest1));
    store(s0, S::add(S::mul(m, r.beta2), S::mul(g, r.rest2)));
    return S::sub(S::if_less(zero, u, one, zero), S::if_less(u, zero, one, zero));
  } else if constexpr (A == Algorithm::sgd) {
    if (!r.momentum) return g;
    const F buffer = !plain && r.first ? g : S::add(S::mul(load(s0), r.beta1), S::mul(g, r.rest2));
    store(s0, buffer);
    return !plain && r.nesterov ? S::add(g, S::mul(buffer, r.beta1)) : buffer;
  } else if constexpr (A == Algorithm::adagrad) {
    const F total = S::add(load(s0), S::mul(g, g));
    store(s0, total);
    return S::div(g, S::add(S::sqrt(total), r.eps));
  } else {
    F square = S::add(S::mul(load(s0), r.beta2), S::mul(S::mul(g, g), r.rest2));
    store(s0, square);
    const auto centre = [&](auto slot) {
      F mean = load(slot);
      mean = S::add(mean, S::mul(S::sub(g, mean), r.rest2));
      store(slot, mean);
      square = S::sub(square, S::mul(mean, mean));
      square = S::if_less(square, S::set1(0.0f), S::set1(0.0f), square);
    };
    if (!plain && r.centered) r.momentum ? centre(s2) : centre(s1);
    F u = S::div(g, S::add(S::sqrt(square), r.eps));
    if (r.momentum) store(s1, u = S::add(S::mul(load(s1), r.beta1), u));
    return u;
  }
}

// The parameter after the step.
template <class S>
inline typename S::F descend(const Rule<S>& r, typename S::F p, typename S::F u) {
  return S::sub(r.decoupled ? S::mul(p, r.decay) : p, S::mul(u, r.length));
}

}  // namespace
}  // namespace pykernels::cpu
