// The body of quantize_rowwise, compiled once for each instruction set.
#pragma once

#include "../launchers.h"
#include "quantize_span.h"

namespace pykernels::cpu {
namespace {

template <class S, class T>
void quantize_rowwise_rows(const QuantizeRowwise& args, int64_t begin, int64_t end) {
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
    } else {
      quantize_span<S>(x, args.K, s.inv, q);
    }
  }
}

}  // namespace
}  // namespace pykernels::cpu
