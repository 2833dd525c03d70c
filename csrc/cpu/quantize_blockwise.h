// The body of quantize_blockwise: every block is quantised on its own, as if it were one row.
#pragma once

#include "../launchers.h"
#include "quantize_colwise.h"
#include "quantize_span.h"

namespace pykernels::cpu {
namespace {

// The codes of width elements in each of the rows [first, last) from column k on.
template <class S, class T>
void quantize_block(const QuantizeBlockwise& args, int64_t first, int64_t last, int64_t k, int64_t width, float inv) {
  for (int64_t m = first; m < last; ++m) {
    int8_t* q = args.q + m * args.K + k;
    if (inv == 0.0f)
      std::memset(q, 0, width);
    else
      quantize_span<S, false>(static_cast<const T*>(args.x) + m * args.x_stride + k, width, inv, q);
  }
}

// Columns of a strip: their absmax stays in the first-level cache.
constexpr int64_t kStripColumns = 2048;

// A row of tiles is read row by row in strips of whole tiles, for the absmax of every column, and tile by tile only for
// the codes: a quarter to a half faster than reading each tile on its own.
template <class S, class T>
void quantize_tiles(const QuantizeBlockwise& args, int64_t first, int64_t last, float* scale) {
  alignas(64) uint32_t columns[kStripColumns + kColumnPadding];
  const int64_t strip = kStripColumns / args.block_cols * args.block_cols;
  QuantizeColwise part{args.x, args.x_dtype, args.x_stride};
  for (int64_t k0 = 0; k0 < args.K; k0 += strip) {
    part.x = static_cast<const T*>(args.x) + k0;
    part.K = std::min(strip, args.K - k0);
    std::memset(columns, 0, sizeof(columns));
    absmax_rows<S, T>(part, first, last, columns, nullptr);
    for (int64_t k = 0; k < part.K; k += args.block_cols) {
      const int64_t width = std::min(args.block_cols, part.K - k);
      uint32_t absmax = 0;
      for (int64_t j = k; j < k + width; ++j) absmax = std::max(absmax, columns[j]);
      const Scale s = scale_of_absmax(absmax);
      *scale++ = s.scale;
      quantize_block<S, T>(args, first, last, k0 + k, width, s.inv);
    }
  }
}

// Rows of blocks [begin, end): block row i holds the rows i * block_rows and on of x.
template <class S, class T>
void quantize_blockwise_rows(const QuantizeBlockwise& args, int64_t begin, int64_t end) {
  const int64_t blocks = (args.K + args.block_cols - 1) / args.block_cols;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t first = i * args.block_rows, last = std::min(args.M, first + args.block_rows);
    float* scale = args.scale + i * blocks;
    if (args.block_rows > 1 && args.block_cols <= kStripColumns) {
      quantize_tiles<S, T>(args, first, last, scale);
      continue;
    }
    for (int64_t k = 0; k < args.K; k += args.block_cols) {
      const int64_t width = std::min(args.block_cols, args.K - k);
      const T* x = static_cast<const T*>(args.x) + k;
      uint32_t absmax = 0;
      for (int64_t m = first; m < last; ++m) absmax = std::max(absmax, absmax_bits<S>(x + m * args.x_stride, width));
      const Scale s = scale_of_absmax(absmax);
      *scale++ = s.scale;
      quantize_block<S, T>(args, first, last, k, width, s.inv);
    }
  }
}

}  // namespace
}  // namespace pykernels::cpu
