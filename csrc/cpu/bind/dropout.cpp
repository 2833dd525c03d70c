#include "../../launchers/dropout.h"

#include <cmath>
#include <optional>

#include "checks.h"

namespace pykernels::cpu {
namespace {

constexpr const char* kOp = "dropout";

void check_residual(const Tensor& residual, const Tensor& x) {
  STD_TORCH_CHECK(residual.scalar_type() == x.scalar_type() || residual.scalar_type() == ScalarType::Float, kOp,
                  ": expected residual to be ", dtype_name(x.scalar_type()),
                  x.scalar_type() == ScalarType::Float ? "" : " or float32", ", got ",
                  dtype_name(residual.scalar_type()));
  check_cpu(kOp, "residual", residual);
  const auto got = residual.sizes(), wanted = x.sizes();
  STD_TORCH_CHECK(got.size() == wanted.size() && std::equal(got.begin(), got.end(), wanted.begin()), kOp,
                  ": expected residual to have the shape of x, ", shape_name(wanted), ", got ", shape_name(got));
}

Tensor dropout_cpu(const Tensor& x, const std::optional<Tensor>& residual, double p, const Tensor& key) {
  check_float(kOp, "x", x);
  if (residual.has_value()) check_residual(*residual, x);
  STD_TORCH_CHECK(p >= 0.0 && p <= 1.0, kOp, ": expected p to be from 0 to 1, got ", p);
  check_dtype(kOp, "key", key, ScalarType::Long);
  STD_TORCH_CHECK(key.is_cpu() && key.dim() == 1 && key.size(0) == 2, kOp,
                  ": expected key to have shape [2] (seed, offset) and to be on the CPU, got ",
                  shape_name(key.sizes()));
  const std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  Tensor out = empty_result(sizes, residual.has_value() ? residual->scalar_type() : x.scalar_type());
  const int64_t n = out.numel();
  if (n == 0) return out;

  Dropout args;
  const int64_t* words = static_cast<const int64_t*>(key.const_data_ptr());
  args.seed = static_cast<uint64_t>(words[0]);
  args.offset = static_cast<uint64_t>(words[key.stride(0)]);
  args.p = static_cast<float>(std::ceil(p * 0x1p24) * 0x1p-24);
  args.factor = p == 1.0 ? 0.0f : static_cast<float>(1.0 / (1.0 - p));
  args.x_dtype = float_dtype(x.scalar_type());
  args.out_dtype = float_dtype(out.scalar_type());
  args.out = out.mutable_data_ptr();
  // Where all of it lies in one piece it is one row; else rows of the last dimension, read where they lie.
  std::optional<Rows> x_rows, residual_rows;
  if (x.is_contiguous() && (!residual.has_value() || residual->is_contiguous())) {
    args.x = x.const_data_ptr();
    if (residual.has_value()) args.residual = residual->const_data_ptr();
    args.K = n;
  } else {
    x_rows.emplace(x);
    args.x = x_rows->tensor.const_data_ptr();
    args.x_stride = x_rows->stride;
    args.K = x_rows->K;
    if (residual.has_value()) {
      residual_rows.emplace(*residual);
      args.residual = residual_rows->tensor.const_data_ptr();
      args.residual_stride = residual_rows->stride;
    }
  }
  args.stream = worth_streaming(out, 32);
  torch::stable::parallel_for(0, n, grain_of(1), [&](int64_t begin, int64_t end) { dropout(args, begin, end); });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykernels, CPU, m) { m.impl("dropout", TORCH_BOX(&dropout_cpu)); }

}  // namespace pykernels::cpu
