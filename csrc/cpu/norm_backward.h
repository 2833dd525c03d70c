// The backward body of rms_norm and layer_norm, compiled once for each instruction set.
#pragma once

#include <type_traits>

#include "../launchers/norm.h"
#include "norm_sweep.h"

namespace pykernels::cpu {
namespace {

// R rows at a time: the weight and the sums along columns are then read once for R rows. With two, every pointer and
// factor stays in a register of AVX2; four are slower.
template <class S, class T, int R, bool kCentre, bool kGradH>
void norm_backward_block(const NormBackward& args, int64_t m, float* weight_sums, float* bias_sums) {
  using F = typename S::F;
  const int64_t K = args.K;
  const float* const weights = args.weight;
  const F zero = S::set1(0.0f), one = S::set1(1.0f);
  const T *grad[R], *grad_h[R], *h[R];
  T* grad_x[R];
  F mean[R], rstd[R];
  for (int r = 0; r < R; ++r) {
    grad[r] = static_cast<const T*>(args.grad) + (m + r) * args.grad_stride;
    h[r] = static_cast<const T*>(args.h) + (m + r) * args.h_stride;
    grad_h[r] = static_cast<const T*>(args.grad_h) + (m + r) * args.grad_h_stride;
    grad_x[r] = static_cast<T*>(args.grad_x) + (m + r) * K;
    mean[r] = S::set1(kCentre ? args.mean[m + r] : 0.0f);
    rstd[r] = S::set1(args.rstd[m + r]);
  }

  // Sums over each row of g * (h - mean), and of g.
  double products[R] = {}, gradients[R] = {};
  for (int64_t begin = 0; begin < K; begin += kSumTerms) {
    F product[R], gradient[R];
    for (int r = 0; r < R; ++r) product[r] = gradient[r] = zero;
    sweep<S, 2>(begin, std::min(K, begin + kSumTerms), [&](auto lanes, int64_t k, int) {
      const F weight = weights != nullptr ? lanes.load(weights + k) : one;
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const F g = S::mul(lanes.load(grad[r] + k), weight);
        F v = lanes.load(h[r] + k);
        if constexpr (kCentre) v = S::sub(v, mean[r]);
        product[r] = S::fma(g, v, product[r]);
        if constexpr (kCentre) gradient[r] = S::add(gradient[r], g);
      }
    });
    for (int r = 0; r < R; ++r) {
      products[r] += static_cast<double>(S::reduce_add(product[r]));
      if constexpr (kCentre) gradients[r] += static_cast<double>(S::reduce_add(gradient[r]));
    }
  }

  F along[R], constant[R];  // grad_x = (g - x_hat * along - constant) * rstd
  for (int r = 0; r < R; ++r) {
    const double columns = static_cast<double>(K);
    along[r] = S::set1(static_cast<float>(-args.rstd[m + r] * products[r] / columns));
    constant[r] = S::set1(static_cast<float>(gradients[r] / columns));
  }
  sweep<S, 1>(0, K, [&](auto lanes, int64_t k, int) {
    const F weight = weights != nullptr ? lanes.load(weights + k) : one;
    F weight_sum = zero, bias_sum = zero;
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const F g = lanes.load(grad[r] + k);
      F v = lanes.load(h[r] + k);
      if constexpr (kCentre) v = S::sub(v, mean[r]);
      v = S::mul(v, rstd[r]);
      weight_sum = S::fma(g, v, weight_sum);
      bias_sum = S::add(bias_sum, g);
      F out = S::mul(g, weight);
      if constexpr (kCentre) out = S::sub(out, constant[r]);
      out = S::mul(S::fma(v, along[r], out), rstd[r]);
      if constexpr (kGradH) out = S::add(out, lanes.load(grad_h[r] + k));
      lanes.store(grad_x[r] + k, out);
    }
    if (weight_sums != nullptr) lanes.store(weight_sums + k, S::add(lanes.load(weight_sums + k), weight_sum));
    if (bias_sums != nullptr) lanes.store(bias_sums + k, S::add(lanes.load(bias_sums + k), bias_sum));
  });
}

template <class S, class T, bool kCentre, bool kGradH>
void norm_backward_chunks(const NormBackward& args, int64_t begin, int64_t end) {
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    float* weight_sums = args.weight_sums != nullptr ? args.weight_sums + chunk * args.K : nullptr;
    float* bias_sums = args.bias_sums != nullptr ? args.bias_sums + chunk * args.K : nullptr;
    if (weight_sums != nullptr) std::memset(weight_sums, 0, args.K * sizeof(float));
    if (bias_sums != nullptr) std::memset(bias_sums, 0, args.K * sizeof(float));
    int64_t m = chunk * args.chunk_rows;
    const int64_t last = std::min(args.M, m + args.chunk_rows);
    for (; m + 2 <= last; m += 2) norm_backward_block<S, T, 2, kCentre, kGradH>(args, m, weight_sums, bias_sums);
    if (m < last) norm_backward_block<S, T, 1, kCentre, kGradH>(args, m, weight_sums, bias_sums);
  }
}

template <class S, class T>
void norm_backward_rows(const NormBackward& args, int64_t begin, int64_t end) {
  const auto with = [&](auto centre, auto grad_h) {
    norm_backward_chunks<S, T, centre.value, grad_h.value>(args, begin, end);
  };
  const auto with_grad_h = [&](auto centre) {
    args.grad_h != nullptr ? with(centre, std::true_type{}) : with(centre, std::false_type{});
  };
  args.mean != nullptr ? with_grad_h(std::true_type{}) : with_grad_h(std::false_type{});
}

template <class S, class T>
void norm_column_sums_of(const float* sums, int64_t chunks, int64_t K, void* out, int64_t begin, int64_t end) {
  sweep<S>(begin, end, [&](auto lanes, int64_t k, int) {
    typename S::F total = S::set1(0.0f);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) total = S::add(total, lanes.load(sums + chunk * K + k));
    lanes.store(static_cast<T*>(out) + k, total);
  });
}

}  // namespace
}  // namespace pykernels::cpu
