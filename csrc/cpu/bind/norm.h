// The bindings of rms_norm and layer_norm: one body, told by `centre` whether there is a mean.
#pragma once

#include <optional>
#include <tuple>

#include "../../launchers/norm.h"
#include "../float_types.h"
#include "checks.h"

namespace pykernels::cpu {

// weight or bias as float32 [K], with the offset added; held by the tensor.
inline std::optional<Tensor> norm_parameter(const char* op, const char* name, const std::optional<Tensor>& parameter,
                                            int64_t K, double offset) {
  if (!parameter) return std::nullopt;
  check_float(op, name, *parameter);
  check_cpu(op, name, *parameter);
  STD_TORCH_CHECK(parameter->dim() == 1 && parameter->size(0) == K, op, ": expected ", name, " to have shape [", K,
                  "], one element for each column of x, got ", shape_name(parameter->sizes()));
  const Tensor given = torch::stable::contiguous(*parameter);
  if (given.scalar_type() == ScalarType::Float && offset == 0.0) return given;
  Tensor out = empty_cpu({K}, ScalarType::Float);
  float* value = static_cast<float*>(out.mutable_data_ptr());
  const float shift = static_cast<float>(offset);
  const auto widen = [&](const auto* from) {
    for (int64_t k = 0; k < K; ++k) value[k] = to_float(from[k]) + shift;
  };
  const void* data = given.const_data_ptr();
  switch (float_dtype(given.scalar_type())) {
    case DType::f16:
      widen(static_cast<const f16*>(data));
      break;
    case DType::bf16:
      widen(static_cast<const bf16*>(data));
      break;
    default:
      widen(static_cast<const float*>(data));
  }
  return out;
}

inline const float* floats_or_null(const std::optional<Tensor>& values) {
  return values ? static_cast<const float*>(values->const_data_ptr()) : nullptr;
}

// A tensor like another, as rows.
inline Rows norm_rows_like(const char* op, const char* name, const Tensor& tensor, const char* other_name,
                           const Tensor& other) {
  check_dtype(op, name, tensor, other.scalar_type());
  check_cpu(op, name, tensor);
  const auto sizes = tensor.sizes(), expected = other.sizes();
  STD_TORCH_CHECK(std::equal(sizes.begin(), sizes.end(), expected.begin(), expected.end()), op, ": expected ", name,
                  " to have the shape of ", other_name, ", ", shape_name(expected), ", got ", shape_name(sizes));
  return Rows(tensor);
}

struct NormResult {
  Tensor y, h, rstd, mean;  // quantised: y int8, its scale in the place of rstd, and no mean
};

inline NormResult run_norm(const char* op, const Tensor& x, const std::optional<Tensor>& weight,
                           const std::optional<Tensor>& bias, const std::optional<Tensor>& residual, double eps,
                           double weight_offset, bool keep_h, bool centre, bool quantize) {
  check_float(op, "x", x);
  check_cpu(op, "x", x);
  STD_TORCH_CHECK(x.dim() >= 1, op, ": expected x to have at least 1 dimension, got 0");
  const Rows rows(x);
  const std::vector<int64_t> row_sizes(rows.sizes.begin(), rows.sizes.end() - 1);
  const std::optional<Tensor> weights = norm_parameter(op, "weight", weight, rows.K, weight_offset);
  const std::optional<Tensor> biases = norm_parameter(op, "bias", bias, rows.K, 0.0);

  NormForward args;
  args.x = rows.tensor.const_data_ptr();
  args.x_stride = rows.stride;
  args.dtype = float_dtype(x.scalar_type());
  args.K = rows.K;
  args.weight = floats_or_null(weights);
  args.bias = floats_or_null(biases);
  args.eps = eps;
  args.centre = centre;
  std::optional<Rows> added;
  if (residual) {
    added.emplace(norm_rows_like(op, "residual", *residual, "x", x));
    args.residual = added->tensor.const_data_ptr();
    args.residual_stride = added->stride;
  }
  keep_h = keep_h && residual;
  NormResult out{empty_result(rows.sizes, quantize ? ScalarType::Char : x.scalar_type()),
                 empty_result(keep_h ? rows.sizes : std::vector<int64_t>{0}, x.scalar_type()),
                 empty_cpu(row_sizes, ScalarType::Float),
                 empty_cpu(centre && !quantize ? row_sizes : std::vector<int64_t>{0}, ScalarType::Float)};
  if (keep_h) args.h = out.h.mutable_data_ptr();
  if (quantize) {
    args.q = static_cast<int8_t*>(out.y.mutable_data_ptr());
    args.scale = static_cast<float*>(out.rstd.mutable_data_ptr());
  } else {
    args.y = out.y.mutable_data_ptr();
    args.rstd = static_cast<float*>(out.rstd.mutable_data_ptr());
    if (centre) args.mean = static_cast<float*>(out.mean.mutable_data_ptr());
  }
  args.stream = worth_streaming(quantize ? out.h : out.y, rows.K);
  torch::stable::parallel_for(0, rows.M, grain_of(rows.K),
                              [&](int64_t begin, int64_t end) { norm_forward(args, begin, end); });
  return out;
}

// One value for each row of h, contiguous.
inline Tensor norm_statistic(const char* op, const char* name, const Tensor& values, const Rows& h) {
  check_dtype(op, name, values, ScalarType::Float);
  check_cpu(op, name, values);
  const auto sizes = values.sizes();
  STD_TORCH_CHECK(std::equal(sizes.begin(), sizes.end(), h.sizes.begin(), h.sizes.end() - 1), op, ": expected ", name,
                  " to have shape ", shape_name(std::vector<int64_t>(h.sizes.begin(), h.sizes.end() - 1)), ", got ",
                  shape_name(sizes));
  return torch::stable::contiguous(values);
}

inline std::tuple<Tensor, Tensor, Tensor> run_norm_backward(const char* op, const Tensor& grad,
                                                            const std::optional<Tensor>& grad_h, const Tensor& h,
                                                            const std::optional<Tensor>& weight, const Tensor& rstd,
                                                            const std::optional<Tensor>& mean, double weight_offset,
                                                            bool weight_grad, std::optional<ScalarType> bias_dtype) {
  check_float(op, "h", h);
  check_cpu(op, "h", h);
  STD_TORCH_CHECK(h.dim() >= 1, op, ": expected h to have at least 1 dimension, got 0");
  const Rows rows(h);
  const int64_t M = rows.M, K = rows.K;
  const Rows grads = norm_rows_like(op, "grad", grad, "h", h);
  const std::optional<Tensor> weights = norm_parameter(op, "weight", weight, K, weight_offset);
  const Tensor inverse = norm_statistic(op, "rstd", rstd, rows);
  std::optional<Tensor> means;
  if (mean) means = norm_statistic(op, "mean", *mean, rows);
  if (bias_dtype)
    STD_TORCH_CHECK(is_float16_or_32(*bias_dtype), op, ": expected bias_dtype to be float32, bfloat16 or float16, got ",
                    dtype_name(*bias_dtype));

  NormBackward args;
  args.grad = grads.tensor.const_data_ptr();
  args.grad_stride = grads.stride;
  std::optional<Rows> added;
  if (grad_h) {
    added.emplace(norm_rows_like(op, "grad_h", *grad_h, "h", h));
    args.grad_h = added->tensor.const_data_ptr();
    args.grad_h_stride = added->stride;
  }
  args.h = rows.tensor.const_data_ptr();
  args.h_stride = rows.stride;
  args.dtype = float_dtype(h.scalar_type());
  args.M = M, args.K = K;
  args.weight = floats_or_null(weights);
  args.rstd = static_cast<const float*>(inverse.const_data_ptr());
  args.mean = floats_or_null(means);
  Tensor grad_x = empty_result(rows.sizes, h.scalar_type());
  args.grad_x = grad_x.mutable_data_ptr();

  args.stream = worth_streaming(grad_x, K);
  args.chunk_rows = norm_chunk_rows(M);
  const int64_t chunks = (M + args.chunk_rows - 1) / args.chunk_rows;
  weight_grad = weight_grad && weight;
  const auto sums = [&](bool wanted) { return empty_result({wanted ? chunks : 0, wanted ? K : 0}, ScalarType::Float); };
  Tensor weight_sums = sums(weight_grad), bias_sums = sums(bias_dtype.has_value());
  if (weight_grad) args.weight_sums = static_cast<float*>(weight_sums.mutable_data_ptr());
  if (bias_dtype) args.bias_sums = static_cast<float*>(bias_sums.mutable_data_ptr());
  torch::stable::parallel_for(0, chunks, grain_of(K * args.chunk_rows),
                              [&](int64_t begin, int64_t end) { norm_backward(args, begin, end); });

  const auto parameter_grad = [&](bool wanted, const float* partial, ScalarType dtype) {
    Tensor out = empty_cpu({wanted ? K : 0}, dtype);
    void* data = out.mutable_data_ptr();
    if (wanted)
      torch::stable::parallel_for(0, K, grain_of(chunks), [&](int64_t begin, int64_t end) {
        norm_column_sums(partial, chunks, K, float_dtype(dtype), data, begin, end);
      });
    return out;
  };
  return {grad_x, parameter_grad(weight_grad, args.weight_sums, weight ? weight->scalar_type() : h.scalar_type()),
          parameter_grad(bias_dtype.has_value(), args.bias_sums, bias_dtype.value_or(h.scalar_type()))};
}

}  // namespace pykernels::cpu
