// float64 parameters, an element at a time: states are float64 too, gradients may be of any type.
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "float_types.h"
#include "optimizer_kernels.h"
#include "optimizer_rules.h"

namespace pykernels::cpu {
namespace {

// A vector of one double.
struct Double {
  using F = double;

  static F set1(double v) { return v; }
  static F add(F a, F b) { return a + b; }
  static F sub(F a, F b) { return a - b; }
  static F mul(F a, F b) { return a * b; }
  static F div(F a, F b) { return a / b; }
  static F sqrt(F v) { return std::sqrt(v); }
  static F max(F a, F b) { return a > b ? a : b; }
  static F negate(F v) { return -v; }
  static F keep_nan(F x, F v) { return x == x ? v : x; }
  static F if_less(F a, F b, F yes, F no) { return a < b ? yes : no; }
};

double grad_at(const OptimizerRule& rule, const OptimizerTensor& tensor, int64_t i) {
  switch (rule.grad_dtype) {
    case DType::f64:
      return static_cast<const double*>(tensor.grad)[i];
    case DType::f32:
      return static_cast<double>(static_cast<const float*>(tensor.grad)[i]);
    case DType::bf16:
      return static_cast<double>(to_float(static_cast<const bf16*>(tensor.grad)[i]));
    default:
      return static_cast<double>(to_float(static_cast<const f16*>(tensor.grad)[i]));
  }
}

template <bool keep>
struct States {
  const OptimizerTensor& tensor;
  int64_t i;

  template <int slot>
  double load() const {
    return static_cast<const double*>(tensor.state[slot])[i];
  }
  template <int slot>
  void store(double v) const {
    if constexpr (keep) static_cast<double*>(tensor.state[slot])[i] = v;
  }
};

// Calls take(i, parameter, direction) for each element of the blocks.
template <Algorithm A, bool keep, class Take>
void each_element(const OptimizerRule& rule, const OptimizerTensor& tensor, int64_t begin, int64_t end,
                  const Rule<Double>& r, const Take& take) {
  const int64_t per_row = tensor.blocks_of_row(rule.block);
  for (int64_t b = begin; b < end; ++b) {
    const int64_t column = b % per_row * rule.block, first = b / per_row * tensor.columns + column;
    for (int64_t i = first; i < first + std::min(rule.block, tensor.columns - column); ++i) {
      const double p = static_cast<const double*>(tensor.param)[i];
      take(i, p, advance<Double, A, false>(r, p, grad_at(rule, tensor, i), States<keep>{tensor, i}));
    }
  }
}

template <bool keep, class Take>
void each(const OptimizerRule& rule, const OptimizerTensor& tensor, int64_t begin, int64_t end, const Rule<Double>& r,
          const Take& take) {
  using enum Algorithm;
  switch (rule.algorithm) {
    case adam:
      return each_element<adam, keep>(rule, tensor, begin, end, r, take);
    case lamb:
      return each_element<lamb, keep>(rule, tensor, begin, end, r, take);
    case lion:
      return each_element<lion, keep>(rule, tensor, begin, end, r, take);
    case sgd:
      return each_element<sgd, keep>(rule, tensor, begin, end, r, take);
    case adagrad:
      return each_element<adagrad, keep>(rule, tensor, begin, end, r, take);
    case rmsprop:
      return each_element<rmsprop, keep>(rule, tensor, begin, end, r, take);
  }
}

}  // namespace

void optimizer_update_f64(const OptimizerRule& rule, const OptimizerTensor& tensor, int64_t begin, int64_t end) {
  const Rule<Double> r(rule, tensor);
  double *param = static_cast<double*>(tensor.param), *extra = static_cast<double*>(tensor.extra);
  each<true>(rule, tensor, begin, end, r, [&](int64_t i, double p, double u) {
    param[i] = descend<Double>(r, p, u);
    if (extra != nullptr) extra[i] = param[i] - static_cast<double>(static_cast<float>(param[i]));
  });
}

void optimizer_norms_f64(const OptimizerRule& rule, const OptimizerTensor& tensor, int64_t begin, int64_t end,
                         double (&sums)[2]) {
  each<false>(rule, tensor, begin, end, Rule<Double>(rule, tensor),
              [&](int64_t, double p, double u) { sums[0] += p * p, sums[1] += u * u; });
}

}  // namespace pykernels::cpu
