// The forward body of rms_norm and layer_norm, compiled once for each instruction set.
#pragma once

#include <cmath>
#include <limits>
#include <type_traits>

#include "../launchers/norm.h"
#include "norm_sweep.h"
#include "quantize_span.h"
#include "stream_row.h"

namespace pykernels::cpu {
namespace {

template <class T>
struct NormRow {
  const T* h;
  float mean;
  float rstd;
};

struct Moments {
  double mean;
  double squares;  // sum of (h - mean)^2
};

// Both sums from one reading, of the distances to a pivot among the row's own values. Where they all but cancel, the
// first values being far from the rest, or are not finite, squares is NaN.
template <class V, class T>
Moments row_moments(const T* h, int64_t K) {
  using F = typename V::F;
  const float middle = V::reduce_add(V::load(h)) / V::kWidth;
  const F pivot = V::set1(middle);
  double distance = 0.0, squares = 0.0;
  for (int64_t begin = 0; begin < K; begin += kSumTerms) {
    F d[2] = {V::set1(0.0f), V::set1(0.0f)}, s[2] = {V::set1(0.0f), V::set1(0.0f)};
    sweep<V, 2>(begin, std::min(K, begin + kSumTerms), [&](auto lanes, int64_t k, int j) {
      const F v = lanes.only(V::sub(lanes.load(h + k), pivot));
      d[j] = V::add(d[j], v);
      s[j] = V::fma(v, v, s[j]);
    });
    distance += static_cast<double>(V::reduce_add(V::add(d[0], d[1])));
    squares += static_cast<double>(V::reduce_add(V::add(s[0], s[1])));
  }
  const double n = static_cast<double>(K), left = squares - distance * distance / n;
  return {middle + distance / n, squares <= 16.0 * left ? left : std::numeric_limits<double>::quiet_NaN()};
}

// Reads the row from memory; h is left in the cache for what follows.
template <class V, class T>
NormRow<T> norm_statistics(const NormForward& args, int64_t m, T* row) {
  using F = typename V::F;
  const int64_t K = args.K;
  const T* x = static_cast<const T*>(args.x) + m * args.x_stride;
  const T* h = x;
  double mean = 0.0, squares = std::numeric_limits<double>::quiet_NaN();
  if (args.residual != nullptr) {
    const T* residual = static_cast<const T*>(args.residual) + m * args.residual_stride;
    h = row;
    const double sum = sum_row<V>(K, [&](auto lanes, int64_t k, F acc) {
      lanes.template store<false>(row + k, V::add(lanes.load(x + k), lanes.load(residual + k)));
      const F v = lanes.load(row + k);  // as it was rounded
      return args.centre ? V::add(acc, v) : V::fma(v, v, acc);
    });
    if (args.centre)
      mean = sum / static_cast<double>(K);
    else
      squares = sum;
  } else if (sizeof(T) == 2 && args.centre && K >= V::kWidth) {  // float32 would keep too few of its digits
    const Moments moments = row_moments<V>(h, K);
    mean = moments.mean, squares = moments.squares;
  } else if (args.centre) {
    mean = sum_row<V>(K, [&](auto lanes, int64_t k, F acc) { return V::add(acc, lanes.load(h + k)); }) /
           static_cast<double>(K);
  } else {
    squares = sum_row<V>(K, [&](auto lanes, int64_t k, F acc) {
      const F v = lanes.load(h + k);
      return V::fma(v, v, acc);
    });
  }
  const float centre = plain_nan(static_cast<float>(mean));
  if (args.centre && std::isnan(squares)) {
    const F middle = V::set1(centre);
    squares = sum_row<V>(K, [&](auto lanes, int64_t k, F acc) {
      const F v = lanes.only(V::sub(lanes.load(h + k), middle));
      return V::fma(v, v, acc);
    });
  }
  const double variance = squares / static_cast<double>(K);
  return {h, centre, plain_nan(static_cast<float>(1.0 / std::sqrt(variance + args.eps)))};
}

// weight and bias: as put_in_order leaves them. next: the row of x to fetch meanwhile, or null.
template <class V, class T, bool kCentre, bool kWeight, bool kBias, bool kStream>
void normalise_row(int64_t K, const float* weight, const float* bias, const NormRow<T>& row, const T* next, T* y) {
  using F = typename V::F;
  const F mean = V::set1(row.mean), rstd = V::set1(row.rstd);
  const T* const h = row.h;
  sweep<V, 2>(0, K, [&](auto lanes, int64_t k, int j) {
    if (j == 0 && next != nullptr) fetch(next, k, 2 * V::kWidth);
    F v = lanes.load(h + k);
    if constexpr (kCentre) v = V::sub(v, mean);
    v = V::mul(v, rstd);
    if constexpr (kWeight && kBias) v = V::fma(v, V::load_ordered(weight + k), V::load_ordered(bias + k));
    if constexpr (kWeight && !kBias) v = V::mul(v, V::load_ordered(weight + k));
    if constexpr (!kWeight && kBias) v = V::add(v, V::load_ordered(bias + k));
    lanes.template store<kStream>(y + k, v);
  });
}

template <class S, class T, bool kCentre, bool kWeight, bool kBias, bool kStream>
void norm_rows(const NormForward& args, int64_t begin, int64_t end, float* scratch) {
  using V = Twice<S, T>;
  const int64_t K = args.K, line = norm_line(K);
  float *const weight = scratch, *const bias = weight + line;
  T* const h_row = reinterpret_cast<T*>(bias + line);
  T* const y_row = reinterpret_cast<T*>(bias + 2 * line);
  if constexpr (kWeight) put_in_order<V>(args.weight, K, weight);
  if constexpr (kBias) put_in_order<V>(args.bias, K, bias);
  for (int64_t m = begin; m < end; ++m) {
    T* const h = args.h != nullptr ? static_cast<T*>(args.h) + m * K : nullptr;
    const NormRow<T> row = norm_statistics<V, T>(args, m, h != nullptr && !kStream ? h : h_row);
    if (kStream && h != nullptr) stream_row<S>(row.h, h, K * static_cast<int64_t>(sizeof(T)));
    if (args.rstd != nullptr) args.rstd[m] = row.rstd;
    if (args.mean != nullptr) args.mean[m] = row.mean;
    T* y = args.scale == nullptr ? static_cast<T*>(args.y) + m * K : y_row;
    const T* next = m + 1 < end ? static_cast<const T*>(args.x) + (m + 1) * args.x_stride : nullptr;
    if (args.scale == nullptr) {
      normalise_row<V, T, kCentre, kWeight, kBias, kStream>(K, weight, bias, row, next, y);
      continue;
    }
    normalise_row<V, T, kCentre, kWeight, kBias, false>(K, weight, bias, row, next, y);
    const Scale s = scale_of_absmax(absmax_bits<S>(y, K));
    args.scale[m] = s.scale;
    int8_t* q = args.q + m * K;
    if (s.inv == 0.0f) {
      std::memset(q, 0, K);
    } else {
      quantize_span<S, false>(y, K, s.inv, q);
    }
  }
  if constexpr (kStream) S::fence();
}

template <class S, class T>
void norm_forward_rows(const NormForward& args, int64_t begin, int64_t end, float* scratch) {
  const auto with = [&](auto centre, auto weight, auto bias) {
    args.stream ? norm_rows<S, T, centre.value, weight.value, bias.value, true>(args, begin, end, scratch)
                : norm_rows<S, T, centre.value, weight.value, bias.value, false>(args, begin, end, scratch);
  };
  const auto with_bias = [&](auto centre, auto weight) {
    args.bias != nullptr ? with(centre, weight, std::true_type{}) : with(centre, weight, std::false_type{});
  };
  const auto with_weight = [&](auto centre) {
    args.weight != nullptr ? with_bias(centre, std::true_type{}) : with_bias(centre, std::false_type{});
  };
  args.centre ? with_weight(std::true_type{}) : with_weight(std::false_type{});
}

}  // namespace
}  // namespace pykernels::cpu
