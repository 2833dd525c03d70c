// The update rules, eight neighbours at a time, in the order of operations of pykernels/ops/_optimizer_reference.py.
// Every operation is rounded by itself: a contracted multiply-add would move last bits.
#pragma once

#include "common.cuh"
#include "optimizer_update.h"

namespace pykernels::cuda {

constexpr int kLane = 8;  // neighbours a thread holds

__device__ __forceinline__ float add(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ float sub(float a, float b) { return __fsub_rn(a, b); }
__device__ __forceinline__ float mul(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ float div(float a, float b) { return __fdiv_rn(a, b); }
__device__ __forceinline__ float root(float a) { return __fsqrt_rn(a); }
__device__ __forceinline__ double add(double a, double b) { return __dadd_rn(a, b); }
__device__ __forceinline__ double sub(double a, double b) { return __dsub_rn(a, b); }
__device__ __forceinline__ double mul(double a, double b) { return __dmul_rn(a, b); }
__device__ __forceinline__ double div(double a, double b) { return __ddiv_rn(a, b); }
__device__ __forceinline__ double root(double a) { return __dsqrt_rn(a); }

// The numbers of one tensor's step, in the width of the update.
template <typename W>
struct Numbers {
  W beta1, rest1, beta2, rest2, eps, weight_decay;  // rest is 1 - beta
  W length, decayed, root_factor, unit;
  bool first;  // step 1
};

template <typename W>
__device__ __forceinline__ W larger(W a, W b) {
  return a != a || a > b ? a : b;  // NaN wins
}

// (direction, new states) of one element.
template <typename W>
__device__ __forceinline__ W advance(Rule rule, int flags, bool coupled, const Numbers<W>& n, W p, W g, W& s0, W& s1,
                                     W& s2) {
  if (flags & kMaximize) g = -g;
  if (coupled) g = add(g, mul(p, n.weight_decay));
  if (rule == Rule::adam || rule == Rule::lamb) {
    s0 = add(s0, mul(sub(g, s0), n.rest1));
    s1 = add(mul(s1, n.beta2), mul(mul(g, g), n.rest2));
    W v = s1;
    if (flags & kAmsgrad) v = s2 = larger(s2, s1);
    const W u = div(s0, add(mul(root(v), n.root_factor), n.eps));
    return rule == Rule::lamb ? add(mul(u, n.unit), mul(p, n.weight_decay)) : u;
  }
  if (rule == Rule::lion) {
    const W mix = add(mul(s0, n.beta1), mul(g, n.rest1));
    s0 = add(mul(s0, n.beta2), mul(g, n.rest2));
    return W(mix > W(0)) - W(mix < W(0));
  }
  if (rule == Rule::sgd) {
    if (!(flags & kMomentum)) return g;
    s0 = n.first ? g : add(mul(s0, n.beta1), mul(g, n.rest2));
    return flags & kNesterov ? add(g, mul(s0, n.beta1)) : s0;
  }
  if (rule == Rule::adagrad) {
    s0 = add(s0, mul(g, g));
    return div(g, add(root(s0), n.eps));
  }
  s0 = add(mul(s0, n.beta2), mul(mul(g, g), n.rest2));
  W square = s0;
  if (flags & kCentered) {
    const bool third = flags & kMomentum;
    const W old = third ? s2 : s1, mean = add(old, mul(sub(g, old), n.rest2));
    s1 = third ? s1 : mean;
    s2 = third ? mean : s2;
    square = larger(sub(square, mul(mean, mean)), W(0));
  }
  const W u = div(g, add(root(square), n.eps));
  if (!(flags & kMomentum)) return u;
  return s1 = add(mul(s1, n.beta1), u);
}

// The reference's corrections: what depends on the step, in float64.
struct Corrections {
  double factor, root_factor, unit;
};

__device__ __forceinline__ double power(double base, float exponent) {
  double result = 1.0;
  for (auto left = static_cast<uint32_t>(exponent); left != 0; left >>= 1) {
    if (left & 1) result = mul(result, base);
    base = mul(base, base);
  }
  return result;
}

__device__ __forceinline__ Corrections corrections(const OptimizerUpdate& args, float step) {
  Corrections c = {1.0, 1.0, 1.0};
  if ((args.rule == Rule::adam || args.rule == Rule::lamb) && !(args.flags & kUncorrected)) {
    c.unit = div(1.0, sub(1.0, power(args.beta1, step)));
    c.root_factor = div(1.0, root(sub(1.0, power(args.beta2, step))));
    if (args.rule == Rule::adam) c.factor = c.unit;
  }
  if (args.rule == Rule::adagrad) {
    c.factor = div(1.0, add(1.0, mul(sub(static_cast<double>(step), 1.0), args.beta1)));
  }
  return c;
}

}  // namespace pykernels::cuda
