// The first read that quantize_colwise and quantize_both share.
#pragma once

#include "checks.h"

namespace pykernels::cpu {

inline int64_t padded_columns(int64_t K) { return (K + kColumnPadding - 1) / kColumnPadding * kColumnPadding; }

// The absmax of every column, padded; of every row too where row_absmax is given. Each chunk of rows has its own copy
// of the columns, and a maximum does not depend on the order in which they are merged.
inline std::vector<uint32_t> reduce_absmax(const QuantizeColwise& args, int64_t M, uint32_t* row_absmax) {
  const int64_t width = padded_columns(args.K), grain = grain_of(args.K);
  const int64_t chunks =
      std::clamp<int64_t>((M + grain - 1) / grain, 1, static_cast<int64_t>(torch::stable::get_num_threads()));
  std::vector<uint32_t> absmax(chunks * width);
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c)
      absmax_columns(args, M * c / chunks, M * (c + 1) / chunks, absmax.data() + c * width, row_absmax);
  });
  for (int64_t c = 1; c < chunks; ++c)
    for (int64_t k = 0; k < args.K; ++k) absmax[k] = std::max(absmax[k], absmax[c * width + k]);
  return absmax;
}

}  // namespace pykernels::cpu
