// Runs a product for each group of rows over torch's thread pool, and the checks that its two bindings share.
#pragma once

#include <cstring>

#include "int8_matmul_run.h"

namespace pykernels::cpu {

// The product of one group, of which `whole` says all but the rows: b, b_scale and bias step from expert to expert.
struct Int8Grouped {
  Int8Matmul whole;
  std::vector<int64_t> counts;
  int64_t b_step = 0;  // elements from one expert's b to the next

  Int8Matmul rows_of(int64_t expert, int64_t m0, int64_t count) const {
    Int8Matmul part = whole;
    part.M = count;
    part.a = offset_by(whole.a, whole.a_dtype, m0 * whole.a_stride);
    part.b += expert * b_step;
    part.epilogue = epilogue_from(whole.epilogue, m0);
    if (part.epilogue.b_scale != nullptr) part.epilogue.b_scale += expert * whole.N;
    part.epilogue.bias = offset_by(whole.epilogue.bias, whole.epilogue.bias_dtype, expert * whole.N);
    return part;
  }
};

// Parts whose rows share a workspace. The items of all of them are numbered through, so that threads take them as they
// come: experts of very different sizes leave none without work.
class GroupedBatch {
 public:
  void add(const Int8Matmul& part) {
    const Int8MatmulPlan plan = plan_int8_matmul(part);
    parts_.push_back({part, plan, workspace_bytes_, row_items_, tile_items_});
    workspace_bytes_ += plan.workspace_bytes;  // a multiple of 64, as the next one's place must be
    row_items_ += plan.row_items;
    tile_items_ += plan.tile_items;
    rows_ += part.M;
  }

  int64_t rows() const { return rows_; }

  void run() {
    if (parts_.empty()) return;
    static thread_local Scratch scratch;
    char* workspace = scratch.get(workspace_bytes_);
    const int64_t N = parts_[0].args.N, K = parts_[0].args.K;
    const int64_t at_once = rows_ * K <= kSerialElements ? row_items_ + 1 : row_items_ < 64 ? 1 : 4;
    parallel_items(row_items_, at_once, [&](int64_t begin, int64_t end) {
      each(&Part::first_row_item, &Int8MatmulPlan::row_items, begin, end, workspace, int8_matmul_rows);
    });
    const int64_t tiles_at_once = rows_ * N * K <= kSerialProducts ? tile_items_ + 1 : 1;
    parallel_items(tile_items_, tiles_at_once, [&](int64_t begin, int64_t end) {
      each(&Part::first_tile_item, &Int8MatmulPlan::tile_items, begin, end, workspace, int8_matmul_tiles);
    });
    *this = {};
  }

 private:
  struct Part {
    Int8Matmul args;
    Int8MatmulPlan plan;
    int64_t workspace;
    int64_t first_row_item;
    int64_t first_tile_item;
  };

  // stage(part, its items) for every part that has items among [begin, end).
  template <class Stage>
  void each(int64_t Part::* first, int64_t Int8MatmulPlan::* items, int64_t begin, int64_t end, char* workspace,
            const Stage& stage) const {
    auto part = std::upper_bound(parts_.begin(), parts_.end(), begin,
                                 [&](int64_t item, const Part& p) { return item < p.*first; });
    for (--part; part != parts_.end() && (*part).*first < end; ++part) {
      const int64_t from = std::max(begin - (*part).*first, int64_t{0});
      const int64_t to = std::min(end - (*part).*first, part->plan.*items);
      if (from < to) stage(part->args, part->plan, workspace + part->workspace, from, to);
    }
  }

  std::vector<Part> parts_;
  int64_t workspace_bytes_ = 0;
  int64_t row_items_ = 0;
  int64_t tile_items_ = 0;
  int64_t rows_ = 0;
};

// Every group, then zeros in the rows that no expert counts. whole.M is the number of all rows.
inline void run_int8_grouped(const Int8Grouped& grouped) {
  const Int8Matmul& whole = grouped.whole;
  if (whole.M == 0 || whole.N == 0) return;
  const int64_t at_most = int8_matmul_block_rows(whole.K);
  GroupedBatch batch;
  int64_t m0 = 0;
  for (size_t expert = 0; expert < grouped.counts.size(); ++expert)
    for (int64_t left = grouped.counts[expert]; left > 0;) {
      const int64_t rows = std::min(left, at_most);
      if (batch.rows() + rows > at_most) batch.run();
      batch.add(grouped.rows_of(static_cast<int64_t>(expert), m0, rows));
      m0 += rows, left -= rows;
    }
  batch.run();
  void* rest = const_cast<void*>(offset_by(whole.epilogue.out, whole.epilogue.out_dtype, m0 * whole.N));
  const void* end = offset_by(whole.epilogue.out, whole.epilogue.out_dtype, whole.M * whole.N);
  std::memset(rest, 0, static_cast<size_t>(static_cast<const char*>(end) - static_cast<const char*>(rest)));
}

// b int8 [E, N, K] and counts [E] for rows of K elements; sets all of `grouped` that they say. The returned tensor
// holds b.
inline Tensor check_experts(const char* op, const char* name, const Tensor& b, const char* rows_name, int64_t K,
                            int64_t rows, const Tensor& counts, Int8Grouped* grouped) {
  check_dtype(op, name, b, ScalarType::Char);
  STD_TORCH_CHECK(b.dim() == 3, op, ": expected ", name, " to have 3 dimensions, got ", b.dim());
  check_cpu(op, name, b);
  STD_TORCH_CHECK(b.size(2) == K, op, ": expected ", name, " to have shape [E, N, ", K, "], with the K of ", rows_name,
                  ", got ", shape_name(b.sizes()));
  check_k(op, K);
  const ScalarType type = counts.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Int || type == ScalarType::Long, op,
                  ": expected counts to be int32 or int64, got ", dtype_name(type));
  check_cpu(op, "counts", counts);
  STD_TORCH_CHECK(counts.dim() == 1 && counts.numel() == b.size(0), op, ": expected counts to have shape [", b.size(0),
                  "], one element for each expert, got ", shape_name(counts.sizes()));
  const Tensor held = torch::stable::contiguous(counts);
  int64_t sum = 0;
  for (int64_t e = 0; e < b.size(0); ++e) {
    const int64_t count = type == ScalarType::Int ? static_cast<const int32_t*>(held.const_data_ptr())[e]
                                                  : static_cast<const int64_t*>(held.const_data_ptr())[e];
    grouped->counts.push_back(count);
    STD_TORCH_CHECK(count >= 0, op, ": expected counts to be 0 or more, got ", count, " for expert ", e);
    sum = count > rows || sum > rows ? std::max(sum, count) : sum + count;
  }
  STD_TORCH_CHECK(sum <= rows, op, ": expected counts to sum to at most the ", rows, " rows, got more");

  Tensor codes = b.stride(2) == 1 || K <= 1 ? b : torch::stable::contiguous(b);
  grouped->whole.M = rows, grouped->whole.N = b.size(1), grouped->whole.K = K;
  grouped->whole.b = static_cast<const int8_t*>(codes.const_data_ptr());
  grouped->whole.b_stride = codes.stride(1);
  grouped->b_step = codes.stride(0);
  return codes;
}

// [E, N] with the dtype of what it should be, contiguous.
inline Tensor check_per_expert(const char* op, const char* name, const Tensor& value, const Tensor& b) {
  check_cpu(op, name, value);
  STD_TORCH_CHECK(value.dim() == 2 && value.size(0) == b.size(0) && value.size(1) == b.size(1), op, ": expected ", name,
                  " to have shape [", b.size(0), ", ", b.size(1), "], got ", shape_name(value.sizes()));
  return torch::stable::contiguous(value);
}

inline Tensor check_expert_scale(const char* op, const char* name, const Tensor& scale, const Tensor& b, Epilogue* e) {
  check_dtype(op, name, scale, ScalarType::Float);
  const Tensor held = check_per_expert(op, name, scale, b);
  e->b_scale = static_cast<const float*>(held.const_data_ptr());
  e->b_scale_stride = 1;
  return held;
}

inline Tensor check_expert_bias(const char* op, const Tensor& bias, const Tensor& b, Epilogue* e) {
  check_float(op, "bias", bias);
  const Tensor held = check_per_expert(op, "bias", bias, b);
  e->bias = held.const_data_ptr();
  e->bias_dtype = float_dtype(bias.scalar_type());
  return held;
}

}  // namespace pykernels::cpu
