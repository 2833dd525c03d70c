// The body of quantize_rowwise, compiled once for each instruction set.
#pragma once

#include "../launchers.h"
#include "quantize_span.h"

namespace pykernels::cpu {
namespace {

// Fetching the next row while this one is quantised gains a fifth at 8 KiB a row (4096 of bf16), and loses as much at
// 16 KiB, where two rows and the codes no longer fit in the first-level cache.
constexpr int64_t kPrefetchedRowBytes = 8192;

template <class S, class T>
void quantize_rowwise_rows(const QuantizeRowwise& args, int64_t begin, int64_t end) {
  const bool fits = args.K * static_cast<int64_t>(sizeof(T)) <= kPrefetchedRowBytes;
  for (int64_t m = begin; m < end; ++m) {
    const T* x = static_cast<const T*>(args.x) + m * args.x_stride;
    int8_t* q = args.q + m * args.q_stride;
    const uint32_t absmax = absmax_bits<S>(x, args.K);
    const Scale s = args.given_scale == nullptr ? scale_of_absmax(absmax)
                                                : scale_of_given(args.given_scale[m * args.given_scale_stride], absmax);
    args.scale[m] = s.scale;
    if (s.inv == 0.0f) {
      std::memset(q, 0, args.K);
    } else if (args.stochastic) {
      quantize_span_stochastic<S>(x, args.K, s.inv, m * args.K, PhiloxKey{args.seed, 0}, q);
    } else if (args.given_scale != nullptr) {
      quantize_span<S, true>(x, args.K, s.inv, q);
    } else {
      quantize_span<S, false>(x, args.K, s.inv, q, fits && m + 1 < end ? x + args.x_stride : nullptr);
    }
  }
}

}  // namespace
}  // namespace pykernels::cpu
