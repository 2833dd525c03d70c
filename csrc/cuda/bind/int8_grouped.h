// What the bindings of the two grouped products check and set alike.
#pragma once

#include "../int8_grouped_matmul.h"
#include "checks.h"

namespace pykernels::cuda {

// b int8 [E, N, K] and counts [E] on the device of rows [T, K]; their values stay there.
inline void set_experts(const char* op, Int8GroupedMatmul& p, EpilogueArgs& args, const char* rows_name,
                        const Tensor& rows, const char* name, const Tensor& b, const Tensor& counts) {
  STD_TORCH_CHECK(rows.dim() == 2, op, ": expected ", rows_name, " to have 2 dimensions, got ", rows.dim());
  check_dtype(op, name, b, ScalarType::Char);
  STD_TORCH_CHECK(b.dim() == 3, op, ": expected ", name, " to have 3 dimensions, got ", b.dim());
  check_device(op, name, b, rows_name, rows);
  const int64_t k = rows.size(1), experts = b.size(0);
  STD_TORCH_CHECK(b.size(2) == k, op, ": expected ", name, " to have shape [E, N, ", k, "], with the K of ", rows_name,
                  ", got ", shape_name(b.sizes()));
  check_k(op, k);
  const ScalarType type = counts.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Int || type == ScalarType::Long, op,
                  ": expected counts to be int32 or int64, got ", dtype_name(type));
  check_device(op, "counts", counts, rows_name, rows);
  check_vector(op, "counts", counts, experts, "expert");
  p.counts = args.hold(counts);
  p.counts_are_wide = type == ScalarType::Long;
  p.experts = experts;
  p.rows = rows.size(0);
  p.n = b.size(1);
  p.k = k;
  args.held.push_back(b.stride(2) == 1 || k <= 1 ? b : torch::stable::contiguous(b));
  p.b = static_cast<const int8_t*>(args.held.back().const_data_ptr());
  p.b_step = args.held.back().stride(0);
  p.b_stride = args.held.back().stride(1);
}

inline const void* per_expert(const char* op, EpilogueArgs& args, const char* name, const Tensor& value,
                              const char* b_name, const Tensor& b) {
  check_device(op, name, value, b_name, b);
  STD_TORCH_CHECK(value.dim() == 2 && value.size(0) == b.size(0) && value.size(1) == b.size(1), op, ": expected ", name,
                  " to have shape [", b.size(0), ", ", b.size(1), "], got ", shape_name(value.sizes()));
  return args.hold(value);
}

inline void set_expert_scale(const char* op, EpilogueArgs& args, const char* name, const Tensor& scale,
                             const char* b_name, const Tensor& b) {
  check_dtype(op, name, scale, ScalarType::Float);
  args.epilogue.b_scale = static_cast<const float*>(per_expert(op, args, name, scale, b_name, b));
  args.epilogue.b_scale_stride = 1;
}

inline void set_expert_bias(const char* op, EpilogueArgs& args, const std::optional<Tensor>& bias, const char* b_name,
                            const Tensor& b, int64_t activation) {
  if (bias.has_value()) {
    check_float(op, "bias", *bias);
    args.epilogue.bias = per_expert(op, args, "bias", *bias, b_name, b);
    args.epilogue.bias_dtype = float_dtype(bias->scalar_type());
  }
  STD_TORCH_CHECK(activation >= 0 && activation <= 4, op, ": expected activation to be 0 to 4, got ", activation);
  args.epilogue.activation = static_cast<Activation>(activation);
}

}  // namespace pykernels::cuda
