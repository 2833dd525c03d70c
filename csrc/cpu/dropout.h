// The body of dropout, compiled once for each instruction set.
#pragma once

#include "dropout_kernels.h"
#include "simd_twice.h"

namespace pykernels::cpu {
namespace {

// The S::kKept elements from x on, which begin at a counter; residual may be null.
template <class S, bool kStream, class T, class O>
inline void dropout_block(const typename S::Kept& kept, uint32_t counter, float factor, const T* x, const O* residual,
                          O* out) {
  using X = Twice<S, T>;
  using Y = Twice<S, O>;
  typename S::I mask[S::kKept / S::kWidth];
  kept.template masks<T>(counter, mask);
#pragma GCC unroll 4
  for (int j = 0; j < S::kKept; j += X::kWidth) {
    const auto* const pair = mask + j / S::kWidth;
    typename S::Two y = X::mul(S::load2_kept(x + j, pair[0], pair[1]), X::set1(factor));
    if constexpr (sizeof(T) != sizeof(O)) y = X::from_order(y);
    if (residual != nullptr) y = Y::add(Y::load(residual + j), y);
    kStream ? Y::stream(out + j, y) : Y::store(out + j, y);
  }
}

// Elements [first, first + n) of the whole tensor, in a row of memory. Blocks of S::kKept begin at multiples of it,
// where a counter begins and, where args.stream, a line of memory; one that is cut off is worked on in a copy.
template <class S, bool kStream, class T, class O>
void dropout_span(const Dropout& args, const typename S::Kept& kept, const T* x, const O* residual, O* out,
                  int64_t first, int64_t n) {
  constexpr int64_t N = S::kKept;
  const auto counter = [&](int64_t element) { return static_cast<uint32_t>(args.offset + (element >> 2)); };
  for (int64_t k = 0; k < n;) {
    const int64_t skip = (first + k) % N, count = std::min(N - skip, n - k);
    if (count == N) {
      dropout_block<S, kStream>(kept, counter(first + k), args.factor, x + k, residual ? residual + k : nullptr,
                                out + k);
    } else {
      T some[N] = {};
      O added[N] = {}, result[N];
      std::memcpy(some + skip, x + k, count * sizeof(T));
      if (residual != nullptr) std::memcpy(added + skip, residual + k, count * sizeof(O));
      dropout_block<S, false>(kept, counter(first + k - skip), args.factor, some, residual ? added : nullptr, result);
      std::memcpy(out + k, result + skip, count * sizeof(O));
    }
    k += count;
  }
}

template <class S, class T, class O>
void dropout_range(const Dropout& args, int64_t begin, int64_t end) {
  const uint32_t limit = static_cast<uint32_t>(args.p * 0x1p24f);
  while (begin < end) {
    const uint64_t counter = args.offset + (static_cast<uint64_t>(begin) >> 2);
    const uint32_t upper = static_cast<uint32_t>(counter >> 32);
    const typename S::Kept kept(args.seed, upper, limit);
    const int64_t counters = (int64_t{1} << 32) - static_cast<uint32_t>(counter);  // with that upper half
    const int64_t last = std::min(end, begin + 4 * counters - (begin & 3));
    while (begin < last) {
      const int64_t m = begin / args.K, k = begin % args.K, n = std::min(last - begin, args.K - k);
      const T* x = static_cast<const T*>(args.x) + m * args.x_stride + k;
      const O* residual = static_cast<const O*>(args.residual);
      if (residual != nullptr) residual += m * args.residual_stride + k;
      O* out = static_cast<O*>(args.out) + begin;
      args.stream ? dropout_span<S, true>(args, kept, x, residual, out, begin, n)
                  : dropout_span<S, false>(args, kept, x, residual, out, begin, n);
      begin += n;
    }
  }
  if (args.stream) S::fence();
}

template <class S>
constexpr DropoutKernels dropout_kernels() {
  return {{dropout_range<S, float, float>, dropout_range<S, f16, f16>, dropout_range<S, bf16, bf16>},
          {dropout_range<S, float, float>, dropout_range<S, f16, float>, dropout_range<S, bf16, float>}};
}

}  // namespace
}  // namespace pykernels::cpu
