// The two passes of clipping by the norm.
#pragma once

namespace pykernels::cpu {
namespace {

// Whether a sum of a few hundred float32 squares can have lost nothing to overflow, and nothing that counts to
// underflow. Where this is false the squares are added up again in double; 0 must be: tiny numbers give it too.
inline bool square_sum_is_safe(float sum) { return sum > 0x1p-80f && sum < 0x1p127f; }

template <class S>
inline void add_squares(typename S::F v, double& sum) {
  float lanes[S::kWidth];
  S::store(lanes, v);
  for (float lane : lanes) sum += static_cast<double>(lane) * static_cast<double>(lane);
}

template <class S, class T>
double squared_norm_of(const void* x, int64_t n) {
  constexpr int kChains = 4;
  constexpr int64_t kSpan = 64 * kChains * S::kWidth;
  const T* from = static_cast<const T*>(x);
  const auto part = [&](int64_t k, int64_t end) {
    return k + S::kWidth <= end ? S::load(from + k) : S::load_tail(from + k, static_cast<int>(end - k));
  };
  double total = 0.0;
  for (int64_t begin = 0; begin < n; begin += kSpan) {
    const int64_t end = std::min(n, begin + kSpan);
    typename S::F sums[kChains];
    for (auto& sum : sums) sum = S::set1(0.0f);
    int64_t k = begin;
    for (; k + kChains * S::kWidth <= end; k += kChains * S::kWidth)
#pragma GCC unroll 4
      for (int j = 0; j < kChains; ++j) {
        const auto v = S::load(from + k + j * S::kWidth);
        sums[j] = S::add(sums[j], S::mul(v, v));
      }
    for (; k < end; k += S::kWidth) {
      const auto v = part(k, end);
      sums[0] = S::add(sums[0], S::mul(v, v));
    }
    const float sum = S::reduce_add(S::add(S::add(sums[0], sums[1]), S::add(sums[2], sums[3])));
    if (square_sum_is_safe(sum)) {
      total += static_cast<double>(sum);
    } else {
      for (k = begin; k < end; k += S::kWidth) add_squares<S>(part(k, end), total);
    }
  }
  return total;
}

template <class S, class T>
void scale_values(void* x, int64_t n, float factor) {
  T* data = static_cast<T*>(x);
  const auto f = S::set1(factor);
  int64_t k = 0;
  for (; k + S::kWidth <= n; k += S::kWidth) S::store(data + k, S::mul(S::load(data + k), f));
  if (k < n) {
    const int rest = static_cast<int>(n - k);
    S::store_tail(data + k, S::mul(S::load_tail(data + k, rest), f), rest);
  }
}

}  // namespace
}  // namespace pykernels::cpu
