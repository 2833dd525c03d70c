// The body of dropout, compiled once for each instruction set.
#pragma once

#include "dropout_kernels.h"
#include "quantize_span.h"

namespace pykernels::cpu {
namespace {

// n elements in a row of memory; first is the index of the first among those of the whole tensor.
template <class S, class T, class O>
void dropout_span(const Dropout& args, const T* x, const O* residual, O* out, int64_t first, int64_t n) {
  constexpr int W = S::kWidth;
  using F = typename S::F;
  using Chunk = UniformChunk<S>;
  const F p = S::set1(args.p), factor = S::set1(args.factor), zero = S::set1(0.0f);
  const auto kept = [&](F v, F u) { return S::if_less(u, p, zero, S::mul(v, factor)); };
  const PhiloxKey key{args.seed, 0};
  Chunk chunk;
  for (int64_t begin = 0; begin < n; begin += Chunk::kChunk) {
    const int count = static_cast<int>(std::min<int64_t>(Chunk::kChunk, n - begin));
    const float* u = chunk.fill(first + begin, count, key, args.offset);
    int k = 0;
    const auto run = [&](const auto& add) {
      for (; k + W <= count; k += W)
        S::store(out + begin + k, add(kept(S::load(x + begin + k), S::load(u + k)), Whole<S>{}));
      if (k < count) {
        const int rest = count - k;
        const F y = kept(S::load_tail(x + begin + k, rest), S::load_tail(u + k, rest));
        S::store_tail(out + begin + k, add(y, Part<S>{rest}), rest);
      }
    };
    if (residual == nullptr) {
      run([](F y, const auto&) { return y; });
    } else {
      run([&](F y, const auto& load) { return S::add(load(residual + begin + k), y); });
    }
  }
}

template <class S, class T, class O>
void dropout_range(const Dropout& args, int64_t begin, int64_t end) {
  while (begin < end) {
    const int64_t m = begin / args.K, k = begin % args.K;
    const int64_t n = std::min(end - begin, args.K - k);
    const O* residual = static_cast<const O*>(args.residual);
    if (residual != nullptr) residual += m * args.residual_stride + k;
    dropout_span<S>(args, static_cast<const T*>(args.x) + m * args.x_stride + k, residual,
                    static_cast<O*>(args.out) + begin, begin, n);
    begin += n;
  }
}

template <class S>
constexpr DropoutKernels dropout_kernels() {
  return {{dropout_range<S, float, float>, dropout_range<S, f16, f16>, dropout_range<S, bf16, bf16>},
          {dropout_range<S, float, float>, dropout_range<S, f16, float>, dropout_range<S, bf16, float>}};
}

}  // namespace
}  // namespace pykernels::cpu
