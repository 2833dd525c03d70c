// The second read of quantize_both: 64 x 64 tiles, each quantised by rows into q and by columns, transposed, into qt.
// quantize_transposed makes qt alone: q is null, and row_inv is not read.
// The first read, the absmax of rows and columns at once, is absmax_rows of quantize_colwise.h.
#pragma once

#include "../launchers.h"
#include "quantize_colwise.h"

namespace pykernels::cpu {
namespace {

constexpr int kTile = 64;

// A strip of 1024 columns is read row by row, a page of float32 at a time, before it is transposed: reading 64 rows
// tile by tile defeats the hardware prefetcher. The padding keeps the lines of a column of the buffer in different
// cache sets.
constexpr int kStrip = 1024;
constexpr int kStripStride = kStrip + kTile;

// A transposed copy of this size bypasses the caches: its lines go to a page each, and fetching them first took half of
// the time.
constexpr int64_t kStreamedBytes = 4 << 20;

// Bytes as lanes of 16; the compiler turns the shuffles into the unpack or zip instructions of the target.
typedef int8_t Bytes __attribute__((vector_size(16)));

inline Bytes zip_low(Bytes a, Bytes b) {
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}

inline Bytes zip_high(Bytes a, Bytes b) {
  return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}

// Zipping row i with row i + 8, four times over, transposes 16 x 16.
inline void transpose_16x16(const int8_t* in, int8_t* out) {
  Bytes a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) std::memcpy(&a[i], in + i * kStripStride, sizeof(Bytes));
#pragma GCC unroll 2
  for (int twice = 0; twice < 2; ++twice) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) b[2 * i] = zip_low(a[i], a[i + 8]), b[2 * i + 1] = zip_high(a[i], a[i + 8]);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) a[2 * i] = zip_low(b[i], b[i + 8]), a[2 * i + 1] = zip_high(b[i], b[i + 8]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) std::memcpy(out + i * kTile, &a[i], sizeof(Bytes));
}

inline void transpose_tile(const int8_t* in, int8_t* out) {
  for (int r = 0; r < kTile; r += 16)
    for (int c = 0; c < kTile; c += 16) transpose_16x16(in + r * kStripStride + c, out + c * kTile + r);
}

// n elements of row m from column k on: with BY_ROW codes under the row's scale, and codes under the columns', which
// may run past n.
template <class S, bool BY_ROW, class T>
void quantize_line(const QuantizeBoth& args, const T* x, int64_t m, int64_t k, int n, int8_t* by_row, int8_t* by_col) {
  constexpr int W = S::kWidth;
  const typename S::F row_inv = S::set1(BY_ROW ? args.row_inv[m] : 0.0f);
  const float* inv = args.col_inv + k;
  UniformChunk<S> row_chunk, col_chunk;
  const float *row_u = nullptr, *col_u = nullptr;
  if (args.stochastic) {
    if constexpr (BY_ROW) row_u = row_chunk.fill(m * args.K + k, n, PhiloxKey{args.seed, 0});
    col_u = col_chunk.fill(m * args.K + k, n, PhiloxKey{args.seed, 1});
  }
  const auto codes = [&](int at, auto load, typename S::I& row, typename S::I& col) {
    const typename S::F v = load(x + at), col_inv = load(inv + at);
    if (col_u == nullptr) {
      if constexpr (BY_ROW) row = column_code<S>(v, row_inv, nullptr);
      col = column_code<S>(v, col_inv, nullptr);
    } else {
      if constexpr (BY_ROW) {
        const typename S::F ru = load(row_u + at);
        row = column_code<S>(v, row_inv, &ru);
      }
      const typename S::F cu = load(col_u + at);
      col = column_code<S>(v, col_inv, &cu);
    }
  };
  int at = 0;
  for (; at + 4 * W <= n; at += 4 * W) {
    typename S::I rows[4], cols[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) codes(at + j * W, Whole<S>{}, rows[j], cols[j]);
    if constexpr (BY_ROW) S::store_i8(by_row + at, rows);
    S::store_i8(by_col + at, cols);
  }
  typename S::I row, col;
  for (; at + W <= n; at += W) {
    codes(at, Whole<S>{}, row, col);
    if constexpr (BY_ROW) S::store_i8(by_row + at, row);
    S::store_i8(by_col + at, col);
  }
  if (at < n) {
    codes(at, Part<S>{n - at}, row, col);
    if constexpr (BY_ROW) S::store_i8_tail(by_row + at, row, n - at);
    S::store_i8(by_col + at, col);
  }
}

// Rows [begin, end), begin a multiple of 64.
template <class S, class T>
void quantize_both_rows(const QuantizeBoth& args, int64_t begin, int64_t end) {
  constexpr int kChunk = UniformChunk<S>::kChunk;
  alignas(64) int8_t by_col[kTile * kStripStride], transposed[kTile * kTile];
  const bool aligned = (reinterpret_cast<uintptr_t>(args.qt) | static_cast<uintptr_t>(args.M)) % kTile == 0;
  const bool stream = aligned && args.M * args.K >= kStreamedBytes;
  for (int64_t m0 = begin; m0 < end; m0 += kTile) {
    const int rows = static_cast<int>(std::min<int64_t>(kTile, end - m0));
    for (int64_t k0 = 0; k0 < args.K; k0 += kStrip) {
      const int64_t k1 = std::min<int64_t>(args.K, k0 + kStrip);
      for (int r = 0; r < rows; ++r) {
        const int64_t m = m0 + r;
        const T* x = static_cast<const T*>(args.x) + m * args.x_stride;
        for (int64_t k = k0; k < k1; k += kChunk) {
          const int n = static_cast<int>(std::min<int64_t>(kChunk, k1 - k));
          int8_t* codes = by_col + r * kStripStride + (k - k0);
          if (args.q == nullptr)
            quantize_line<S, false>(args, x + k, m, k, n, nullptr, codes);
          else
            quantize_line<S, true>(args, x + k, m, k, n, args.q + m * args.K + k, codes);
        }
      }
      for (int64_t k = k0; k < k1; k += kTile) {
        transpose_tile(by_col + (k - k0), transposed);
        const int cols = static_cast<int>(std::min<int64_t>(kTile, k1 - k));
        for (int c = 0; c < cols; ++c) {
          int8_t* qt = args.qt + (k + c) * args.M + m0;
          if (stream)
            S::stream_line(qt, transposed + c * kTile);
          else
            std::memcpy(qt, transposed + c * kTile, rows);
        }
      }
    }
  }
  if (stream) S::fence();
}

}  // namespace
}  // namespace pykernels::cpu
