// The body of quantize_blockwise: every block is quantised on its own, as if it were one row.
#pragma once

#include "../launchers.h"
#include "quantize_span.h"

namespace pykernels::cpu {
namespace {

// Rows of blocks [begin, end): block row i holds the rows i * block_rows and on of x.
template <class S, class T>
void quantize_blockwise_rows(const QuantizeBlockwise& args, int64_t begin, int64_t end) {
  const int64_t blocks = (args.K + args.block_cols - 1) / args.block_cols;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t first = i * args.block_rows, last = std::min(args.M, first + args.block_rows);
    for (int64_t j = 0; j < blocks; ++j) {
      const int64_t k = j * args.block_cols, width = std::min(args.block_cols, args.K - k);
      const T* x = static_cast<const T*>(args.x) + k;
      uint32_t absmax = 0;
      for (int64_t m = first; m < last; ++m) absmax = std::max(absmax, absmax_bits<S>(x + m * args.x_stride, width));
      const Scale s = scale_of_absmax(absmax);
      args.scale[i * blocks + j] = s.scale;
      for (int64_t m = first; m < last; ++m) {
        int8_t* q = args.q + m * args.K + k;
        if (s.inv == 0.0f)
          std::memset(q, 0, width);
        else
          quantize_span<S, false>(x + m * args.x_stride, width, s.inv, q);
      }
    }
  }
}

}  // namespace
}  // namespace pykernels::cpu
