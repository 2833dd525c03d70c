// The body of dequantize: out = float(q - zero_point) * scale, over a grid of blocks that spans rows, columns and
// tiles.
#pragma once

#include "../launchers.h"
#include "quantize_span.h"
#include "stream_row.h"

namespace pykernels::cpu {
namespace {

// One scale for the run, or one for each element of it.
template <class S, bool PerElement, class T>
void dequantize_span(const int8_t* q, int64_t n, const float* scale, const int32_t* zero_point, T* out) {
  constexpr int W = S::kWidth;
  const typename S::F one_scale = S::set1(*scale);
  const typename S::I one_zero = zero_point == nullptr ? S::zero() : S::set1(*zero_point);
  const auto value = [&](int64_t k, auto load) {
    typename S::I zero = one_zero;
    if (PerElement && zero_point != nullptr) zero = load(zero_point + k);
    const typename S::F factor = PerElement ? load(scale + k) : one_scale;
    return S::mul(S::to_float(S::sub(load(q + k), zero)), factor);
  };
  int64_t k = 0;
  for (; k + W <= n; k += W) S::store(out + k, value(k, Whole<S>{}));
  if (k < n) {
    const int rest = static_cast<int>(n - k);
    S::store_tail(out + k, value(k, Part<S>{rest}), rest);
  }
}

// row: room for one row of T where args.stream.
template <class S, class T>
void dequantize_rows(const Dequantize& args, int64_t begin, int64_t end, void* row) {
  const int64_t blocks = (args.K + args.block_cols - 1) / args.block_cols;
  for (int64_t m = begin; m < end; ++m) {
    const int8_t* q = args.q + m * args.q_stride;
    T *const result = static_cast<T*>(args.out) + m * args.K, *const out = args.stream ? static_cast<T*>(row) : result;
    const int64_t first = m / args.block_rows * blocks;
    const auto zero_point = [&](int64_t j) {
      return args.zero_point == nullptr ? nullptr : args.zero_point + first + j;
    };
    if (args.block_cols == 1) dequantize_span<S, true>(q, args.K, args.scale + first, zero_point(0), out);
    for (int64_t j = 0; args.block_cols > 1 && j < blocks; ++j) {
      const int64_t k = j * args.block_cols, width = std::min(args.block_cols, args.K - k);
      dequantize_span<S, false>(q + k, width, args.scale + first + j, zero_point(j), out + k);
    }
    if (args.stream) stream_row<S>(out, result, args.K * static_cast<int64_t>(sizeof(T)));
  }
  if (args.stream) S::fence();
}

}  // namespace
}  // namespace pykernels::cpu
