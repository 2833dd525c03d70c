// The bodies of cross_entropy, its update and its backward, compiled once for each instruction set.
#pragma once

#include "../launchers/cross_entropy.h"

namespace pykernels::cpu {
namespace {

// Logits folded at a time: their maximum is found first, then they are read again from the first-level cache.
constexpr int64_t kFoldedLogits = 1024;
// Stands for "no logit yet": minus infinity would give NaN as its distance to a logit of minus infinity.
constexpr float kLowest = -std::numeric_limits<float>::max();

template <class S, bool Cap>
struct Softcap {
  using F = typename S::F;
  F cap, inverse;

  explicit Softcap(float softcap) : cap(S::set1(softcap)), inverse(S::set1(Cap ? 1.0f / softcap : 0.0f)) {}
  F operator()(F x) const { return Cap ? S::mul(cap, unit(x)) : x; }
  float operator()(float x) const { return Cap ? first((*this)(S::set1(x))) : x; }
  // z / cap. The slope d z / d x is taken from it: from z it would lose two roundings more where it nearly cancels.
  F unit(F x) const { return tanh<S>(S::mul(x, inverse)); }
  F slope(F u) const { return S::sub(S::set1(1.0f), S::mul(u, u)); }
  float slope(float x) const { return Cap ? first(slope(unit(S::set1(x)))) : 1.0f; }

 private:
  static float first(F v) {
    float lane[S::kWidth];
    S::store(lane, v);
    return lane[0];
  }
};

template <class S>
float exp_of(float x) {
  float lane[S::kWidth];
  S::store(lane, exp<S>(S::set1(x)));
  return lane[0];
}

struct Folded {
  float top = kLowest, total = 0.0f, weighted = 0.0f;
};

template <class S, class T>
float max_of(const T* x, int64_t n) {
  constexpr int W = S::kWidth;
  typename S::F best[4] = {S::set1(kLowest), S::set1(kLowest), S::set1(kLowest), S::set1(kLowest)};
  int64_t k = 0;
  for (; k + 4 * W <= n; k += 4 * W) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) best[j] = S::max(best[j], S::load(x + k + j * W));
  }
  for (; k + W <= n; k += W) best[0] = S::max(best[0], S::load(x + k));
  float top = S::reduce_max(S::max(S::max(best[0], best[1]), S::max(best[2], best[3])));
  for (; k < n; ++k) top = std::max(top, to_float(x[k]));
  return top;
}

template <class S, class T, bool Cap>
float sum_of_exp(const T* x, int64_t n, float top, const Softcap<S, Cap>& softcap) {
  constexpr int W = S::kWidth;
  using F = typename S::F;
  const F shift = S::set1(top), zero = S::set1(0.0f);
  F sum[4] = {zero, zero, zero, zero};
  int64_t k = 0;
  for (; k + 4 * W <= n; k += 4 * W) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sum[j] = S::add(sum[j], exp<S>(S::sub(softcap(S::load(x + k + j * W)), shift)));
  }
  for (; k + W <= n; k += W) sum[0] = S::add(sum[0], exp<S>(S::sub(softcap(S::load(x + k)), shift)));
  float total = S::reduce_add(S::add(S::add(sum[0], sum[1]), S::add(sum[2], sum[3])));
  if (k < n) {
    float lane[W];
    const int rest = static_cast<int>(n - k);
    S::store(lane, exp<S>(S::sub(softcap(S::load_tail(x + k, rest)), shift)));
    for (int j = 0; j < rest; ++j) total += lane[j];
  }
  return total;
}

// Sum of weight * z; weight null is 1.
template <class S, class T, bool Cap>
float weighted_sum(const T* x, const float* weight, int64_t n, const Softcap<S, Cap>& softcap) {
  constexpr int W = S::kWidth;
  typename S::F sum[2] = {S::set1(0.0f), S::set1(0.0f)};
  const auto term = [&](int64_t k) {
    const typename S::F z = softcap(S::load(x + k));
    return weight == nullptr ? z : S::mul(z, S::load(weight + k));
  };
  int64_t k = 0;
  for (; k + 2 * W <= n; k += 2 * W) sum[0] = S::add(sum[0], term(k)), sum[1] = S::add(sum[1], term(k + W));
  for (; k + W <= n; k += W) sum[0] = S::add(sum[0], term(k));
  float total = S::reduce_add(S::add(sum[0], sum[1]));
  for (; k < n; ++k) total += softcap(to_float(x[k])) * (weight == nullptr ? 1.0f : weight[k]);
  return total;
}

// Folds a row of n logits into f; weight, where given, begins at the class of x[0].
template <class S, class T, bool Cap>
void fold(const T* x, const float* weight, int64_t n, bool smooth, const Softcap<S, Cap>& softcap, Folded* f) {
  for (int64_t k = 0; k < n; k += kFoldedLogits) {
    const int64_t count = std::min(kFoldedLogits, n - k);
    const float top = std::max(kLowest, softcap(max_of<S>(x + k, count)));  // the cap is monotone
    if (top > f->top) {
      f->total *= exp_of<S>(f->top - top);
      f->top = top;
    }
    f->total += sum_of_exp<S>(x + k, count, f->top, softcap);
    if (smooth) f->weighted += weighted_sum<S>(x + k, weight == nullptr ? nullptr : weight + k, count, softcap);
  }
}

template <class S, class T, bool Cap>
void cross_entropy_rows(const CrossEntropy& args, const CrossEntropyLosses& losses, int64_t begin, int64_t end) {
  const Softcap<S, Cap> softcap(args.softcap);
  const float s = args.label_smoothing;
  for (int64_t m = begin; m < end; ++m) {
    const int64_t target = args.target[m];
    losses.loss[m] = losses.lse[m] = 0.0f;
    losses.correct[m] = false;
    if (target == args.ignore_index) continue;
    const T* x = static_cast<const T*>(args.logits) + m * args.stride;
    Folded f;
    fold<S>(x, args.weight, args.columns, s != 0.0f, softcap, &f);
    const float z = softcap(to_float(x[target])), log_total = std::log(f.total), lse = f.top + log_total;
    float loss = (1.0f - s) * (log_total - (z - f.top)) * (args.weight == nullptr ? 1.0f : args.weight[target]);
    if (s != 0.0f) loss += s / static_cast<float>(args.num_classes) * (args.weight_sum * lse - f.weighted);
    if (args.z_loss != 0.0f) loss += args.z_loss * lse * lse;
    losses.loss[m] = loss;
    losses.lse[m] = lse;
    losses.correct[m] = z >= f.top;
  }
}

template <class S, class T, bool Cap>
void cross_entropy_update_rows(const CrossEntropy& args, float* state, int64_t begin, int64_t end) {
  const Softcap<S, Cap> softcap(args.softcap);
  const float* weight = args.weight == nullptr ? nullptr : args.weight + args.first_class;
  for (int64_t m = begin; m < end; ++m) {
    if (args.target[m] == args.ignore_index) continue;
    const T* x = static_cast<const T*>(args.logits) + m * args.stride;
    float* s = state + m * kCrossEntropyState;
    Folded f{s[0], s[1], s[3]};
    fold<S>(x, weight, args.columns, true, softcap, &f);
    const int64_t target = args.target[m] - args.first_class;
    if (target >= 0 && target < args.columns) s[2] = softcap(to_float(x[target]));
    s[0] = f.top;
    s[1] = f.total;
    s[3] = f.weighted;
  }
}

// d loss / d z[c] = on_p * p[c] - on_all * weight[c] - on_target * [c = target].
struct Slopes {
  float on_p, on_all, on_target;
};

inline Slopes slopes_of(const CrossEntropy& args, const CrossEntropyBackward& backward, int64_t m) {
  const float grad = backward.grad[m * backward.grad_stride], s = args.label_smoothing;
  const float weight = args.weight == nullptr ? 1.0f : args.weight[args.target[m]];
  Slopes d{0.0f, grad * (s / static_cast<float>(args.num_classes)), grad * (1.0f - s) * weight};
  d.on_p = d.on_target + d.on_all * args.weight_sum + 2.0f * args.z_loss * backward.lse[m] * grad;
  if (backward.grad_lse != nullptr) d.on_p += backward.grad_lse[m];
  return d;
}

template <class S, class T, bool Cap, bool Smooth>
void gradient_row(const T* x, T* out, const float* weight, int64_t n, const Slopes& d, float lse,
                  const Softcap<S, Cap>& softcap) {
  constexpr int W = S::kWidth;
  using F = typename S::F;
  const F shift = S::set1(lse), on_p = S::set1(d.on_p), on_all = S::set1(d.on_all);
  const auto slope = [&](F v, F w) {
    const F u = Cap ? softcap.unit(v) : v, z = Cap ? S::mul(softcap.cap, u) : v;
    F dz = S::mul(exp<S>(S::sub(z, shift)), on_p);
    if (Smooth) dz = S::sub(dz, S::mul(on_all, w));
    return Cap ? S::mul(dz, softcap.slope(u)) : dz;
  };
  const F one = S::set1(1.0f);
  int64_t k = 0;
  for (; k + 2 * W <= n; k += 2 * W) {
    F dz[2];
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j)
      dz[j] = slope(S::load(x + k + j * W), Smooth && weight != nullptr ? S::load(weight + k + j * W) : one);
    S::store(out + k, dz[0]), S::store(out + k + W, dz[1]);
  }
  for (; k < n; k += W) {
    const int rest = static_cast<int>(std::min<int64_t>(W, n - k));
    S::store_tail(out + k,
                  slope(S::load_tail(x + k, rest), Smooth && weight != nullptr ? S::load_tail(weight + k, rest) : one),
                  rest);
  }
}

template <class S, class T, bool Cap>
void cross_entropy_backward_rows(const CrossEntropy& args, const CrossEntropyBackward& backward, int64_t begin,
                                 int64_t end) {
  const Softcap<S, Cap> softcap(args.softcap);
  const float* weight = args.weight == nullptr ? nullptr : args.weight + args.first_class;
  for (int64_t m = begin; m < end; ++m) {
    const T* x = static_cast<const T*>(args.logits) + m * args.stride;
    T* out = static_cast<T*>(backward.out) + m * backward.out_stride;
    const bool ignored = args.target[m] == args.ignore_index;
    const Slopes d = ignored ? Slopes{} : slopes_of(args, backward, m);
    if (d.on_p == 0.0f && d.on_all == 0.0f && d.on_target == 0.0f) {
      std::memset(out, 0, args.columns * sizeof(T));
      continue;
    }
    const float lse = backward.lse[m];
    const int64_t target = args.target[m] - args.first_class;
    const bool here = target >= 0 && target < args.columns;
    // The target's own gradient is made apart, so that it is rounded once: p - 1 nearly cancels.
    const float logit = here ? to_float(x[target]) : 0.0f;
    if (d.on_all != 0.0f)
      gradient_row<S, T, Cap, true>(x, out, weight, args.columns, d, lse, softcap);
    else
      gradient_row<S, T, Cap, false>(x, out, weight, args.columns, d, lse, softcap);
    if (here) {
      const float w = weight == nullptr ? 1.0f : weight[target];
      const float dz = d.on_p * exp_of<S>(softcap(logit) - lse) - d.on_all * w - d.on_target;
      out[target] = from_float<T>(dz * softcap.slope(logit));
    }
  }
}

}  // namespace
}  // namespace pykernels::cpu
