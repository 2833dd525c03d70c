// The body of quantize_asymmetric: the range of each row, widened to hold 0, on the 256 codes.
#pragma once

#include "../launchers.h"
#include "quantize_span.h"

namespace pykernels::cpu {
namespace {

template <class S>
struct Range {
  typename S::F lo, hi;
  typename S::I absmax;

  Range() : lo(S::set1(0.0f)), hi(S::set1(0.0f)), absmax(S::zero()) {}
  void take(typename S::F v) {
    lo = S::min(v, lo);
    hi = S::max(v, hi);
    absmax = S::max(absmax, S::abs_bits(v));
  }
};

template <class S, class T>
void quantize_asymmetric_rows(const QuantizeAsymmetric& args, int64_t begin, int64_t end) {
  constexpr int W = S::kWidth;
  for (int64_t m = begin; m < end; ++m) {
    const T* x = static_cast<const T*>(args.x) + m * args.x_stride;
    int8_t* q = args.q + m * args.K;
    Range<S> even, odd;
    int64_t k = 0;
    for (; k + 2 * W <= args.K; k += 2 * W) even.take(S::load(x + k)), odd.take(S::load(x + k + W));
    for (; k + W <= args.K; k += W) even.take(S::load(x + k));
    if (k < args.K) even.take(S::load_tail(x + k, static_cast<int>(args.K - k)));
    const float lo = std::min(S::reduce_min(even.lo), S::reduce_min(odd.lo));
    const float hi = std::max(S::reduce_max(even.hi), S::reduce_max(odd.hi));
    // The range of finite values may still overflow; it counts as not finite.
    const bool finite = S::reduce_max(S::max(even.absmax, odd.absmax)) < kInfBits && std::isfinite(hi - lo);

    if (!finite || hi - lo < 255 * 0x1p-126f) {
      args.scale[m] = finite ? 0.0f : std::numeric_limits<float>::quiet_NaN();
      args.zero_point[m] = 0;
      std::memset(q, 0, args.K);
      continue;
    }
    const float scale = (hi - lo) / 255.0f, inv = 1.0f / scale;
    const auto zero_point = static_cast<int32_t>(std::clamp(std::nearbyint(-128.0f - lo * inv), -128.0f, 127.0f));
    args.scale[m] = scale;
    args.zero_point[m] = zero_point;
    const typename S::F factor = S::set1(inv);
    const typename S::I shift = S::set1(zero_point), least = S::set1(-128), most = S::set1(127);
    const auto code = [&](typename S::F v) {
      return S::min(S::max(S::add(S::round(S::mul(v, factor)), shift), least), most);
    };
    for (k = 0; k + 4 * W <= args.K; k += 4 * W) {
      typename S::I line[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) line[j] = code(S::load(x + k + j * W));
      S::store_i8(q + k, line);
    }
    for (; k + W <= args.K; k += W) S::store_i8(q + k, code(S::load(x + k)));
    if (k < args.K) {
      const int rest = static_cast<int>(args.K - k);
      S::store_i8_tail(q + k, code(S::load_tail(x + k, rest)), rest);
    }
  }
}

}  // namespace
}  // namespace pykernels::cpu
