// The backward body of rms_norm and layer_norm, compiled once for each instruction set.
#pragma once

#include <type_traits>

#include "../launchers/norm.h"
#include "norm_sweep.h"
#include "stream_row.h"

namespace pykernels::cpu {
namespace {

// Half lines of a row, streamed with loads between them that have the same low address bits, are slow, as on rows of a
// multiple of 4 KiB: where a vector is less than a line, the row is streamed from a copy in the cache. Only elements of
// two bytes: two rows of them fit the line of floats that is left of the scratch.
template <class V, class T, bool kStream>
inline constexpr bool kStaged = kStream && sizeof(T) == 2 && V::kWidth * sizeof(T) < 64;

// R rows at a time: the weight and the sums along columns are then read once for R rows. With two, every pointer and
// factor stays in a register of AVX2; four are slower.
template <class V, class T, int R, bool kCentre, bool kGradH, bool kStream>
void norm_backward_block(const NormBackward& args, int64_t m, const float* weights, float* weight_sums,
                         float* bias_sums, T* staged) {
  using S = typename V::One;
  using F = typename V::F;
  const int64_t K = args.K;
  const F zero = V::set1(0.0f), one = V::set1(1.0f);
  const T *grad[R], *grad_h[R], *h[R];
  T* grad_x[R];
  F mean[R], rstd[R];
  for (int r = 0; r < R; ++r) {
    grad[r] = static_cast<const T*>(args.grad) + (m + r) * args.grad_stride;
    h[r] = static_cast<const T*>(args.h) + (m + r) * args.h_stride;
    grad_h[r] = static_cast<const T*>(args.grad_h) + (m + r) * args.grad_h_stride;
    grad_x[r] = kStaged<V, T, kStream> ? staged + r * K : static_cast<T*>(args.grad_x) + (m + r) * K;
    mean[r] = V::set1(kCentre ? plain_nan(args.mean[m + r]) : 0.0f);
    rstd[r] = V::set1(plain_nan(args.rstd[m + r]));
  }

  // Sums over each row of g * (h - mean), and of g.
  double products[R] = {}, gradients[R] = {};
  for (int64_t begin = 0; begin < K; begin += kSumTerms) {
    F product[R], gradient[R];
    for (int r = 0; r < R; ++r) product[r] = gradient[r] = zero;
    sweep<V, 1>(begin, std::min(K, begin + kSumTerms), [&](auto lanes, int64_t k, int) {
      const F weight = weights != nullptr ? V::load_ordered(weights + k) : one;
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const F g = V::mul(lanes.load(grad[r] + k), weight);
        F v = lanes.load(h[r] + k);
        if constexpr (kCentre) v = V::sub(v, mean[r]);
        product[r] = V::fma(g, v, product[r]);
        if constexpr (kCentre) gradient[r] = V::add(gradient[r], g);
      }
    });
    for (int r = 0; r < R; ++r) {
      products[r] += static_cast<double>(V::reduce_add(product[r]));
      if constexpr (kCentre) gradients[r] += static_cast<double>(V::reduce_add(gradient[r]));
    }
  }

  // grad_x = (g - x_hat * along - constant) * rstd. In 16 bits rstd is multiplied into the constants, and x_hat is
  // h * rstd + shift: what float32 loses of it then, where the mean is large, is far below what h was rounded to.
  constexpr bool kFolded = kCentre && sizeof(T) == 2;
  F along[R], constant[R], shift[R];
  for (int r = 0; r < R; ++r) {
    const double columns = static_cast<double>(K);
    const double scale = args.rstd[m + r], factor = kFolded ? scale : 1.0;
    along[r] = V::set1(plain_nan(static_cast<float>(-scale * factor * products[r] / columns)));
    constant[r] = V::set1(plain_nan(static_cast<float>((kFolded ? -factor : 1.0) * gradients[r] / columns)));
    shift[r] = V::set1(kFolded ? plain_nan(static_cast<float>(-scale * args.mean[m + r])) : 0.0f);
  }
  const bool more = m + 2 * R <= args.M;
  sweep<V, 1>(0, K, [&](auto lanes, int64_t k, int) {
    if (more)
      for (int r = 0; r < R; ++r)
        fetch(grad[r] + R * args.grad_stride, k, V::kWidth), fetch(h[r] + R * args.h_stride, k, V::kWidth);
    const F weight = weights != nullptr ? V::load_ordered(weights + k) : one;
    F weight_sum = zero, bias_sum = zero, gs[R], hs[R];  // loaded ahead of the stores, whose low address bits may match
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) gs[r] = lanes.load(grad[r] + k), hs[r] = lanes.load(h[r] + k);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const F g = gs[r];
      F v = hs[r];
      if constexpr (kCentre && !kFolded) v = V::sub(v, mean[r]);
      v = kFolded ? V::fma(v, rstd[r], shift[r]) : V::mul(v, rstd[r]);
      weight_sum = V::fma(g, v, weight_sum);
      bias_sum = V::add(bias_sum, g);
      F out = V::mul(g, weight);
      if constexpr (kFolded) {
        out = V::fma(out, rstd[r], V::fma(v, along[r], constant[r]));
      } else {
        if constexpr (kCentre) out = V::sub(out, constant[r]);
        out = V::mul(V::fma(v, along[r], out), rstd[r]);
      }
      if constexpr (kGradH) out = V::add(out, lanes.load(grad_h[r] + k));
      lanes.template store<kStream && !kStaged<V, T, kStream>>(grad_x[r] + k, out);
    }
    if (weight_sums != nullptr) V::store_ordered(weight_sums + k, V::add(V::load_ordered(weight_sums + k), weight_sum));
    if (bias_sums != nullptr) V::store_ordered(bias_sums + k, V::add(V::load_ordered(bias_sums + k), bias_sum));
  });
  if constexpr (kStaged<V, T, kStream>)
    stream_row<S>(staged, static_cast<T*>(args.grad_x) + m * K, R * K * static_cast<int64_t>(sizeof(T)));
}

template <class S, class T, bool kCentre, bool kGradH, bool kStream>
void norm_backward_chunks(const NormBackward& args, int64_t begin, int64_t end, float* scratch) {
  using V = Twice<S, T>;
  const int64_t K = args.K, line = norm_line(K);
  float* const weights = args.weight != nullptr ? scratch : nullptr;
  float* const weight_sums = args.weight_sums != nullptr ? scratch + line : nullptr;
  float* const bias_sums = args.bias_sums != nullptr ? scratch + 2 * line : nullptr;
  T* const staged = reinterpret_cast<T*>(scratch + 3 * line);
  if (weights != nullptr) put_in_order<V>(args.weight, K, weights);
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    if (weight_sums != nullptr) std::fill_n(weight_sums, line, 0.0f);
    if (bias_sums != nullptr) std::fill_n(bias_sums, line, 0.0f);
    int64_t m = chunk * args.chunk_rows;
    const int64_t last = std::min(args.M, m + args.chunk_rows);
    for (; m + 2 <= last; m += 2)
      norm_backward_block<V, T, 2, kCentre, kGradH, kStream>(args, m, weights, weight_sums, bias_sums, staged);
    if (m < last)
      norm_backward_block<V, T, 1, kCentre, kGradH, kStream>(args, m, weights, weight_sums, bias_sums, staged);
    if (weight_sums != nullptr) take_in_order<V>(weight_sums, K, args.weight_sums + chunk * K);
    if (bias_sums != nullptr) take_in_order<V>(bias_sums, K, args.bias_sums + chunk * K);
  }
  if constexpr (kStream) S::fence();
}

template <class S, class T>
void norm_backward_rows(const NormBackward& args, int64_t begin, int64_t end, float* scratch) {
  const auto with = [&](auto centre, auto grad_h) {
    args.stream ? norm_backward_chunks<S, T, centre.value, grad_h.value, true>(args, begin, end, scratch)
                : norm_backward_chunks<S, T, centre.value, grad_h.value, false>(args, begin, end, scratch);
  };
  const auto with_grad_h = [&](auto centre) {
    args.grad_h != nullptr ? with(centre, std::true_type{}) : with(centre, std::false_type{});
  };
  args.mean != nullptr ? with_grad_h(std::true_type{}) : with_grad_h(std::false_type{});
}

template <class S, class T>
void norm_column_sums_of(const float* sums, int64_t chunks, int64_t K, void* out, int64_t begin, int64_t end) {
  constexpr int W = S::kWidth;
  for (int64_t k = begin; k < end; k += W) {
    const int n = static_cast<int>(std::min<int64_t>(W, end - k));
    typename S::F total = S::set1(0.0f);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const float* p = sums + chunk * K + k;
      total = S::add(total, n == W ? S::load(p) : S::load_tail(p, n));
    }
    n == W ? S::store(static_cast<T*>(out) + k, total) : S::store_tail(static_cast<T*>(out) + k, total, n);
  }
}

}  // namespace
}  // namespace pykernels::cpu
