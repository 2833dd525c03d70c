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

// The direction; `states` gives and takes the states' vectors: load(slot) and store(slot, vector).
template <class S, Algorithm A, class States>
inline __attribute__((always_inline)) typename S::F advance(const Rule<S>& r, typename S::F p, typename S::F g,
                                                            const States& states) {
  using F = typename S::F;
  if (r.scaled) g = S::div(g, r.grad_scale);
  if (r.maximize) g = S::negate(g);
  if (A != Algorithm::lamb && A != Algorithm::lion && r.coupled) g = S::add(g, S::mul(p, r.weight_decay));
  if constexpr (A == Algorithm::adam || A == Algorithm::lamb) {
    F m = states.load(0), v = states.load(1);
    m = S::add(m, S::mul(S::sub(g, m), r.rest1));
    v = S::add(S::mul(v, r.beta2), S::mul(S::mul(g, g), r.rest2));
    states.store(0, m), states.store(1, v);
    if (r.amsgrad) states.store(2, v = nan_max<S>(states.load(2), v));
    const F u = S::div(m, S::add(S::mul(S::sqrt(v), r.root), r.eps));
    return A == Algorithm::adam ? u : S::add(S::mul(u, r.direction), S::mul(p, r.weight_decay));
  } else if constexpr (A == Algorithm::lion) {
    const F m = states.load(0), zero = S::set1(0.0f), one = S::set1(1.0f);
    const F u = S::add(S::mul(m, r.beta1), S::mul(g, r.rest1));
    states.store(0, S::add(S::mul(m, r.beta2), S::mul(g, r.rest2)));
    return S::sub(S::if_less(zero, u, one, zero), S::if_less(u, zero, one, zero));
  } else if constexpr (A == Algorithm::sgd) {
    if (!r.momentum) return g;
    const F buffer = r.first ? g : S::add(S::mul(states.load(0), r.beta1), S::mul(g, r.rest2));
    states.store(0, buffer);
    return r.nesterov ? S::add(g, S::mul(buffer, r.beta1)) : buffer;
  } else if constexpr (A == Algorithm::adagrad) {
    const F total = S::add(states.load(0), S::mul(g, g));
    states.store(0, total);
    return S::div(g, S::add(S::sqrt(total), r.eps));
  } else {
    F square = S::add(S::mul(states.load(0), r.beta2), S::mul(S::mul(g, g), r.rest2));
    states.store(0, square);
    if (r.centered) {
      const int slot = r.momentum ? 2 : 1;
      F mean = states.load(slot);
      mean = S::add(mean, S::mul(S::sub(g, mean), r.rest2));
      states.store(slot, mean);
      square = S::sub(square, S::mul(mean, mean));
      square = S::if_less(square, S::set1(0.0f), S::set1(0.0f), square);
    }
    F u = S::div(g, S::add(S::sqrt(square), r.eps));
    if (r.momentum) states.store(1, u = S::add(S::mul(states.load(1), r.beta1), u));
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
