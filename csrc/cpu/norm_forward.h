// The forward body of rms_norm and layer_norm, compiled once for each instruction set.
#pragma once

#include <cmath>
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

// Reads the row from memory; h is left in the cache for what follows.
template <class V, class T>
NormRow<T> norm_statistics(const NormForward& args, int64_t m, T* row) {
  using F = typename V::F;
  const int64_t K = args.K;
  const T* x = static_cast<const T*>(args.x) + m * args.x_stride;
  const T* h = x;
  double mean = 0.0, squares;
  if (args.residual != nullptr) {
    const T* residual = static_cast<const T*>(args.residual) + m * args.residual_stride;
    h = row;
    const double sum = sum_row<V>(K, [&](auto lanes, int64_t k, F acc) {
      lanes.template store<false>(row + k, V::add(lanes.load(x + k), lanes.load(residual + k)));
      const F v = lanes.load(row + k);  // as it was rounded
      return args.centre ? V::add(acc, v) : V::fma(v, v, acc);
    });
    squares = sum;
    mean = args.centre ? sum / static_cast<double>(K) : 0.0;
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
  if (args.centre) {
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
