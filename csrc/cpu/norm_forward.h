// The forward body of rms_norm and layer_norm, compiled once for each instruction set.
#pragma once

#include <cmath>
#include <type_traits>

#include "../launchers/norm.h"
#include "norm_sweep.h"
#include "quantize_span.h"

namespace pykernels::cpu {
namespace {

template <class S, class T>
struct NormRow {
  const T* h;
  float mean;
  float rstd;
};

// Reads the row from memory; h is left in the cache for what follows.
template <class S, class T>
NormRow<S, T> norm_statistics(const NormForward& args, int64_t m, T* row) {
  using F = typename S::F;
  const int64_t K = args.K;
  const T* x = static_cast<const T*>(args.x) + m * args.x_stride;
  const T* h = x;
  double mean = 0.0, squares;
  if (args.residual != nullptr) {
    const T* residual = static_cast<const T*>(args.residual) + m * args.residual_stride;
    h = row;
    const double sum = sum_row<S>(K, [&](auto lanes, int64_t k, F acc) {
      lanes.store(row + k, S::add(lanes.load(x + k), lanes.load(residual + k)));
      const F v = lanes.load(row + k);  // as it was rounded
      return args.centre ? S::add(acc, v) : S::fma(v, v, acc);
    });
    squares = sum;
    mean = args.centre ? sum / static_cast<double>(K) : 0.0;
  } else if (args.centre) {
    mean = sum_row<S>(K, [&](auto lanes, int64_t k, F acc) { return S::add(acc, lanes.load(h + k)); }) /
           static_cast<double>(K);
  } else {
    squares = sum_row<S>(K, [&](auto lanes, int64_t k, F acc) {
      const F v = lanes.load(h + k);
      return S::fma(v, v, acc);
    });
  }
  const float centre = static_cast<float>(mean);
  if (args.centre) {
    const F middle = S::set1(centre);
    squares = sum_row<S>(K, [&](auto lanes, int64_t k, F acc) {
      const F v = lanes.only(S::sub(lanes.load(h + k), middle));
      return S::fma(v, v, acc);
    });
  }
  const double variance = squares / static_cast<double>(K);
  return {h, centre, static_cast<float>(1.0 / std::sqrt(variance + args.eps))};
}

template <class S, class T, bool kCentre, bool kWeight, bool kBias>
void normalise_row(const NormForward& args, const NormRow<S, T>& row, T* y) {
  using F = typename S::F;
  const F mean = S::set1(row.mean), rstd = S::set1(row.rstd);
  const float *const weight = args.weight, *const bias = args.bias;
  const T* const h = row.h;
  sweep<S>(0, args.K, [&](auto lanes, int64_t k, int) {
    F v = lanes.load(h + k);
    if constexpr (kCentre) v = S::sub(v, mean);
    v = S::mul(v, rstd);
    if constexpr (kWeight && kBias) v = S::fma(v, lanes.load(weight + k), lanes.load(bias + k));
    if constexpr (kWeight && !kBias) v = S::mul(v, lanes.load(weight + k));
    if constexpr (!kWeight && kBias) v = S::add(v, lanes.load(bias + k));
    lanes.store(y + k, v);
  });
}

template <class S, class T, bool kCentre, bool kWeight, bool kBias>
void norm_rows(const NormForward& args, int64_t begin, int64_t end, char* scratch) {
  T* const h_row = reinterpret_cast<T*>(scratch);
  T* const y_row = h_row + args.K;
  for (int64_t m = begin; m < end; ++m) {
    T* h = args.h != nullptr ? static_cast<T*>(args.h) + m * args.K : h_row;
    const NormRow<S, T> row = norm_statistics<S, T>(args, m, h);
    if (args.rstd != nullptr) args.rstd[m] = row.rstd;
    if (args.mean != nullptr) args.mean[m] = row.mean;
    T* y = args.scale == nullptr ? static_cast<T*>(args.y) + m * args.K : y_row;
    normalise_row<S, T, kCentre, kWeight, kBias>(args, row, y);
    if (args.scale == nullptr) continue;
    const Scale s = scale_of_absmax(absmax_bits<S>(y, args.K));
    args.scale[m] = s.scale;
    int8_t* q = args.q + m * args.K;
    if (s.inv == 0.0f) {
      std::memset(q, 0, args.K);
    } else {
      quantize_span<S, false>(y, args.K, s.inv, q);
    }
  }
}

template <class S, class T>
void norm_forward_rows(const NormForward& args, int64_t begin, int64_t end, char* scratch) {
  const auto with = [&](auto centre, auto weight, auto bias) {
    norm_rows<S, T, centre.value, weight.value, bias.value>(args, begin, end, scratch);
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
