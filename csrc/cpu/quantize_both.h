// The second read of quantize_both: 64 x 64 tiles, each quantised by rows into q and by columns, transposed, into qt.
// The first read, the absmax of rows and columns at once, is absmax_rows of quantize_colwise.h.
#pragma once

#include "../launchers.h"
#include "quantize_colwise.h"

namespace pykernels::cpu {
namespace {

constexpr int kTile = 64;

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
  for (int i = 0; i < 16; ++i) std::memcpy(&a[i], in + i * kTile, sizeof(Bytes));
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
    for (int c = 0; c < kTile; c += 16) transpose_16x16(in + r * kTile + c, out + c * kTile + r);
}

// One row of a tile: n <= 64 elements from column k on, as codes under the row's scale and under the columns'.
template <class S, class T>
void quantize_line(const QuantizeBoth& args, const T* x, int64_t m, int64_t k, int n, int8_t* by_row, int8_t* by_col) {
  constexpr int W = S::kWidth;
  const typename S::F row_inv = S::set1(args.row_inv[m]);
  const float* inv = args.col_inv + k;
  UniformChunk<S> row_chunk, col_chunk;
  const float *row_u = nullptr, *col_u = nullptr;
  if (args.stochastic) {
    row_u = row_chunk.fill(m * args.K + k, n, PhiloxKey{args.seed, 0});
    col_u = col_chunk.fill(m * args.K + k, n, PhiloxKey{args.seed, 1});
  }
  const auto codes = [&](int at, auto load, typename S::I& row, typename S::I& col) {
    const typename S::F v = load(x + at), col_inv = load(inv + at);
    if (row_u == nullptr) {
      row = column_code<S>(v, row_inv, nullptr);
      col = column_code<S>(v, col_inv, nullptr);
    } else {
      const typename S::F ru = load(row_u + at), cu = load(col_u + at);
      row = column_code<S>(v, row_inv, &ru);
      col = column_code<S>(v, col_inv, &cu);
    }
  };
  int at = 0;
  for (; at + 4 * W <= n; at += 4 * W) {
    typename S::I rows[4], cols[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) codes(at + j * W, Whole<S>{}, rows[j], cols[j]);
    S::store_i8(by_row + at, rows);
    S::store_i8(by_col + at, cols);
  }
  for (; at < n; at += W) {
    typename S::I row, col;
    if (n - at < W)
      codes(at, Part<S>{n - at}, row, col);
    else
      codes(at, Whole<S>{}, row, col);
    S::store_i8(by_row + at, row);
    S::store_i8(by_col + at, col);
  }
}

// Rows [begin, end), begin a multiple of 64 unless it is 0.
template <class S, class T>
void quantize_both_rows(const QuantizeBoth& args, int64_t begin, int64_t end) {
  alignas(64) int8_t by_row[kTile], by_col[kTile * kTile], transposed[kTile * kTile];
  for (int64_t m0 = begin; m0 < end; m0 += kTile) {
    const int rows = static_cast<int>(std::min<int64_t>(kTile, end - m0));
    for (int64_t k0 = 0; k0 < args.K; k0 += kTile) {
      const int cols = static_cast<int>(std::min<int64_t>(kTile, args.K - k0));
      for (int r = 0; r < rows; ++r) {
        const int64_t m = m0 + r;
        const T* x = static_cast<const T*>(args.x) + m * args.x_stride + k0;
        quantize_line<S>(args, x, m, k0, cols, by_row, by_col + r * kTile);
        std::memcpy(args.q + m * args.K + k0, by_row, cols);
      }
      transpose_tile(by_col, transposed);
      for (int c = 0; c < cols; ++c) std::memcpy(args.qt + (k0 + c) * args.M + m0, transposed + c * kTile, rows);
    }
  }
}

}  // namespace
}  // namespace pykernels::cpu
