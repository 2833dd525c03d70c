// The body of distillation_rows, compiled once for each instruction set. Include it after a simd_*.h.
#pragma once

#include "../launchers/distillation.h"
#include "simd_math.h"

namespace pykernels::cpu {
namespace {

constexpr float kMinusInf = -std::numeric_limits<float>::infinity();
// Float32 sums run over this many elements, then go on in float64.
constexpr int64_t kSummed = 2048;

// n logits; -inf, of probability 0, fills a vector up.
template <class S, class T>
inline typename S::F load_logits(const T* p, int64_t n) {
  if (n >= S::kWidth) return S::load(p);
  float padded[S::kWidth];
  for (int j = 0; j < S::kWidth; ++j) padded[j] = j < n ? to_float(p[j]) : kMinusInf;
  return S::load(padded);
}

// Calls body(k, n) for every vector of [0, V): n elements from k on.
template <class S, class Body>
inline void each_vector(int64_t V, Body&& body) {
  int64_t k = 0;
  for (; k + S::kWidth <= V; k += S::kWidth) body(k, int64_t{S::kWidth});
  if (k < V) body(k, V - k);
}

// The same for a sum of term(k, n).
template <class S, class Term>
inline double sum_vectors(int64_t V, Term&& term) {
  double total = 0;
  for (int64_t start = 0; start < V; start += kSummed) {
    typename S::F sum = S::set1(0.0f);
    each_vector<S>(std::min(kSummed, V - start), [&](int64_t k, int64_t n) { sum = S::add(sum, term(start + k, n)); });
    total += S::reduce_add(sum);
  }
  return total;
}

// weight * value, 0 where the weight is, even if the value is infinite or NaN; the weight is a probability.
template <class S>
inline typename S::F weighted(typename S::F weight, typename S::F value) {
  const typename S::F zero = S::set1(0.0f);
  return S::keep_nan(weight, S::if_less(zero, weight, S::mul(weight, value), zero));
}

// What makes log-probabilities of logits: (x - top) / temperature - log_sum. The top is kept apart, since a log-sum-exp
// of large logits would round away the digits that matter.
template <class S>
struct Softmax {
  typename S::F top, inverse, log_sum;

  // load(k, n) gives the logits.
  template <class Load>
  Softmax(int64_t V, float inverse_temperature, Load&& load) : inverse(S::set1(inverse_temperature)) {
    typename S::F best = S::set1(kMinusInf);
    each_vector<S>(V, [&](int64_t k, int64_t n) { best = S::max(best, load(k, n)); });
    top = S::set1(S::reduce_max(best));
    const double sum =
        sum_vectors<S>(V, [&](int64_t k, int64_t n) { return exp<S>(S::mul(S::sub(load(k, n), top), inverse)); });
    log_sum = S::set1(static_cast<float>(std::log(sum)));
  }
  typename S::F log_probability(typename S::F x) const { return S::sub(S::mul(S::sub(x, top), inverse), log_sum); }
};

// log(p / m) and log(q / m) for the mixture m = beta p + (1 - beta) q, from d = log(p / q). The one of log(m / p) and
// log(m / q) that is near 0 comes from exp(-|d|), which cannot overflow and is exactly 1 where p = q.
template <class S>
inline void against_mixture(typename S::F d, float beta, typename S::F& log_p_m, typename S::F& log_q_m) {
  using F = typename S::F;
  const F zero = S::set1(0.0f), one = S::set1(1.0f), own = S::set1(beta), other = S::set1(1.0f - beta);
  const F weight = S::if_less(zero, d, other, own), rest = S::if_less(zero, d, own, other);
  const F e = exp<S>(S::sub(zero, S::abs(d)));
  const F mixed = S::if_less(e, S::set1(0.5f), S::fma(weight, e, rest), S::fma(weight, S::sub(e, one), one));
  const F near = log<S>(mixed), far = S::add(near, S::abs(d));
  log_p_m = S::sub(zero, S::if_less(zero, d, near, far));
  log_q_m = S::sub(zero, S::if_less(zero, d, far, near));
}

// The student's logits as D sees them: KL(q || p) is taken over the tokens that the teacher allows.
template <class S, Divergence D>
inline typename S::F compared(typename S::F student, typename S::F teacher) {
  if constexpr (D == Divergence::reverse_kl)
    return S::keep_nan(teacher, S::if_less(S::set1(kMinusInf), teacher, student, S::set1(kMinusInf)));
  return student;
}

// One row. label < 0: no hard part.
template <class S, class T, class U, Divergence D>
double distillation_row(const DistillationRows& args, const T* student, const U* teacher, int64_t label, float scale,
                        T* grad) {
  using F = typename S::F;
  const int64_t V = args.V;
  const float inverse = 1.0f / args.temperature;
  const auto load_teacher = [&](int64_t k, int64_t n) { return load_logits<S>(teacher + k, n); };
  const Softmax<S> p_of(V, inverse, load_teacher);
  const Softmax<S> q_of(V, inverse, [&](int64_t k, int64_t n) {
    return compared<S, D>(load_logits<S>(student + k, n), load_teacher(k, n));
  });

  const bool hard = label >= 0;
  const float soft_weight = (1.0f - args.hard_weight) * args.temperature;
  double hard_loss = 0, center = 0;
  Softmax<S> plain = q_of;
  T label_student{};
  if (hard) {
    plain = Softmax<S>(V, 1.0f, [&](int64_t k, int64_t n) { return load_logits<S>(student + k, n); });
    label_student = student[label];
    float log_q[S::kWidth];
    S::store(log_q, plain.log_probability(load_logits<S>(&label_student, 1)));
    hard_loss = -log_q[0];
  }

  // The term of the loss, and where D has a second sum, the term of that.
  const auto terms = [&](F s, F t, F& second) {
    const F log_q = q_of.log_probability(compared<S, D>(s, t)), log_p = p_of.log_probability(t);
    const F q = exp<S>(log_q), p = exp<S>(log_p);
    if constexpr (D == Divergence::kl) return weighted<S>(p, S::sub(log_p, log_q));
    if constexpr (D == Divergence::reverse_kl) return weighted<S>(q, S::sub(log_q, log_p));
    if constexpr (D == Divergence::mse) {
      const F difference = S::sub(q, p);
      second = S::mul(q, S::add(difference, difference));
      return S::mul(difference, difference);
    }
    F log_p_m, log_q_m;
    against_mixture<S>(S::sub(log_p, log_q), args.beta, log_p_m, log_q_m);
    second = weighted<S>(q, log_q_m);
    return weighted<S>(p, log_p_m);
  };
  const F soft_factor = S::set1(soft_weight * scale), hard_factor = S::set1(args.hard_weight * scale);
  const auto gradient = [&](F s, F t) {
    const F log_q = q_of.log_probability(compared<S, D>(s, t)), log_p = p_of.log_probability(t);
    const F q = exp<S>(log_q), mid = S::set1(static_cast<float>(center));
    F g;
    if constexpr (D == Divergence::kl) {
      g = S::sub(q, exp<S>(log_p));
    } else if constexpr (D == Divergence::reverse_kl) {
      g = weighted<S>(q, S::sub(S::sub(log_q, log_p), mid));
    } else if constexpr (D == Divergence::mse) {
      const F difference = S::sub(q, exp<S>(log_p));
      g = S::mul(q, S::sub(S::add(difference, difference), mid));
    } else {
      F log_p_m, log_q_m;
      against_mixture<S>(S::sub(log_p, log_q), args.beta, log_p_m, log_q_m);
      g = S::mul(S::set1(1.0f - args.beta), weighted<S>(q, S::sub(log_q_m, mid)));
    }
    g = S::mul(g, soft_factor);
    return hard ? S::fma(exp<S>(plain.log_probability(s)), hard_factor, g) : g;
  };

  double second_sum = 0;
  double soft_loss = 0;
  for (int64_t start = 0; start < V; start += kSummed) {
    F first = S::set1(0.0f), second = S::set1(0.0f);
    each_vector<S>(std::min(kSummed, V - start), [&](int64_t k, int64_t n) {
      F more = S::set1(0.0f);
      first = S::add(first, terms(load_logits<S>(student + start + k, n), load_teacher(start + k, n), more));
      second = S::add(second, more);
    });
    soft_loss += S::reduce_add(first);
    second_sum += S::reduce_add(second);
  }
  center = D == Divergence::reverse_kl ? soft_loss : second_sum;
  if (D == Divergence::jsd) soft_loss = args.beta * soft_loss + (1.0f - args.beta) * second_sum;

  if (grad != nullptr) {
    each_vector<S>(V, [&](int64_t k, int64_t n) {
      const F g = gradient(load_logits<S>(student + k, n), load_teacher(k, n));
      if (n == S::kWidth)
        S::store(grad + k, g);
      else
        S::store_tail(grad + k, g, static_cast<int>(n));
    });
    if (hard) {
      // Once more, so that 1 is taken off before the rounding to T.
      const F g = gradient(load_logits<S>(&label_student, 1), load_teacher(label, 1));
      S::store_tail(grad + label, S::sub(g, hard_factor), 1);
    }
  }
  return soft_weight * args.temperature * soft_loss + args.hard_weight * hard_loss;
}

template <class S, class T, class U>
void distillation_range(const DistillationRows& args, int64_t begin, int64_t end) {
  for (int64_t m = begin; m < end; ++m) {
    const T* student = static_cast<const T*>(args.student) + m * args.student_stride;
    const U* teacher = static_cast<const U*>(args.teacher) + m * args.teacher_stride;
    T* grad = args.grad == nullptr ? nullptr : static_cast<T*>(args.grad) + m * args.grad_stride;
    if (args.target != nullptr && args.target[m] == args.ignore_index) {
      if (args.loss != nullptr) args.loss[m] = 0.0f;
      if (grad != nullptr) std::memset(static_cast<void*>(grad), 0, args.V * sizeof(T));
      continue;
    }
    const int64_t label = args.target != nullptr && args.hard_weight != 0.0f ? args.target[m] : -1;
    const float scale = args.scale == nullptr ? 1.0f : args.scale[m];
    double loss = 0;
    switch (args.divergence) {
      case Divergence::kl:
        loss = distillation_row<S, T, U, Divergence::kl>(args, student, teacher, label, scale, grad);
        break;
      case Divergence::reverse_kl:
        loss = distillation_row<S, T, U, Divergence::reverse_kl>(args, student, teacher, label, scale, grad);
        break;
      case Divergence::jsd:
        loss = distillation_row<S, T, U, Divergence::jsd>(args, student, teacher, label, scale, grad);
        break;
      case Divergence::mse:
        loss = distillation_row<S, T, U, Divergence::mse>(args, student, teacher, label, scale, grad);
        break;
    }
    if (args.loss != nullptr) args.loss[m] = static_cast<float>(loss);
  }
}

template <class S>
constexpr DistillationKernels distillation_kernels() {
  return {{{distillation_range<S, float, float>, distillation_range<S, float, f16>, distillation_range<S, float, bf16>},
           {distillation_range<S, f16, float>, distillation_range<S, f16, f16>, distillation_range<S, f16, bf16>},
           {distillation_range<S, bf16, float>, distillation_range<S, bf16, f16>, distillation_range<S, bf16, bf16>}}};
}

}  // namespace
}  // namespace pykernels::cpu
