// The bodies of quantize_colwise: the absmax of every column over some rows, and the codes of some rows.
#pragma once

#include "../launchers.h"
#include "quantize_span.h"

namespace pykernels::cpu {
namespace {

// Raises absmax[0 .. K) to the largest |x| of R rows, and where row_absmax is given writes each row's own.
// absmax has room for a whole last vector.
template <class S, int R, class T>
void raise_absmax(const T* x, int64_t stride, int64_t K, uint32_t* absmax, uint32_t* row_absmax) {
  constexpr int W = S::kWidth;
  typename S::I row[R];
  for (auto& best : row) best = S::zero();
  const auto step = [&](int64_t k, auto load) {
    int32_t* at = reinterpret_cast<int32_t*>(absmax + k);
    typename S::I column = S::load(at);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const typename S::I bits = S::abs_bits(load(x + r * stride + k));
      column = S::max(column, bits);
      row[r] = S::max(row[r], bits);
    }
    S::store(at, column);
  };
  int64_t k = 0;
  for (; k + W <= K; k += W) step(k, Whole<S>{});
  if (k < K) step(k, Part<S>{static_cast<int>(K - k)});
  if (row_absmax == nullptr) return;
  for (int r = 0; r < R; ++r) row_absmax[r] = S::reduce_max(row[r]);
}

template <class S, class T>
void absmax_rows(const QuantizeColwise& args, int64_t begin, int64_t end, uint32_t* absmax, uint32_t* row_absmax) {
  const T* x = static_cast<const T*>(args.x);
  const auto rows = [&](int64_t m) { return row_absmax == nullptr ? nullptr : row_absmax + m; };
  int64_t m = begin;
  for (; m + 4 <= end; m += 4) raise_absmax<S, 4>(x + m * args.x_stride, args.x_stride, args.K, absmax, rows(m));
  for (; m < end; ++m) raise_absmax<S, 1>(x + m * args.x_stride, args.x_stride, args.K, absmax, rows(m));
}

// u null: to nearest. inv holds one factor for each element.
template <class S>
typename S::I column_code(typename S::F v, typename S::F inv, const typename S::F* u) {
  v = S::mul_live(v, inv);
  if (u == nullptr) return S::round(v);
  return S::floor(S::clamp(S::add(v, *u), -127.0f, 127.0f));
}

template <class S, class T>
void quantize_colwise_rows(const QuantizeColwise& args, int64_t begin, int64_t end) {
  constexpr int W = S::kWidth;
  using Chunk = UniformChunk<S>;
  Chunk chunk;
  for (int64_t m = begin; m < end; ++m) {
    const T* x = static_cast<const T*>(args.x) + m * args.x_stride;
    int8_t* q = args.q + m * args.K;
    for (int64_t first = 0; first < args.K; first += Chunk::kChunk) {
      const int count = static_cast<int>(std::min<int64_t>(Chunk::kChunk, args.K - first));
      const float* u = args.stochastic ? chunk.fill(m * args.K + first, count, PhiloxKey{args.seed, 0}) : nullptr;
      const auto code = [&](int k, auto load) {
        const typename S::F v = load(x + first + k), inv = load(args.inv + first + k);
        if (u == nullptr) return column_code<S>(v, inv, nullptr);
        const typename S::F number = load(u + k);
        return column_code<S>(v, inv, &number);
      };
      int k = 0;
      for (; k + 4 * W <= count; k += 4 * W) {
        typename S::I line[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) line[j] = code(k + j * W, Whole<S>{});
        S::store_i8(q + first + k, line);
      }
      for (; k + W <= count; k += W) S::store_i8(q + first + k, code(k, Whole<S>{}));
      if (k < count) S::store_i8_tail(q + first + k, code(k, Part<S>{count - k}), count - k);
    }
  }
}

}  // namespace
}  // namespace pykernels::cpu
