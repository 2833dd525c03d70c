#include "int8_grouped.h"

namespace pykernels::cuda {
namespace {

constexpr const char* kOp = "int8_grouped_matmul";

Tensor int8_grouped_matmul_cuda(const Tensor& a, const Tensor& b, const Tensor& counts,
                                const std::optional<Tensor>& a_scale, const std::optional<Tensor>& b_scale,
                                const std::optional<Tensor>& bias, int64_t activation,
                                std::optional<ScalarType> out_dtype) {
  check_dtype(kOp, "a", a, ScalarType::Char);
  const DeviceGuard guard(a.get_device_index());
  Int8GroupedMatmul p;
  EpilogueArgs args;
  set_experts(kOp, p, args, "a", a, "b", b, counts);
  Epilogue& e = args.epilogue;
  if (a_scale.has_value()) {
    check_dtype(kOp, "a_scale", *a_scale, ScalarType::Float);
    check_device(kOp, "a_scale", *a_scale, "the input", a);
    STD_TORCH_CHECK(a_scale->numel() == 1 || (a_scale->dim() == 1 && a_scale->numel() == p.rows), kOp,
                    ": expected a_scale to have 1 element or shape [", p.rows, "], one for each row, got ",
                    shape_name(a_scale->sizes()));
    e.a_scale = static_cast<const float*>(args.hold(*a_scale));
    e.a_scale_stride = a_scale->numel() == 1 ? 0 : 1;
  }
  if (b_scale.has_value()) set_expert_scale(kOp, args, "b_scale", *b_scale, "b", b);
  set_expert_bias(kOp, args, bias, "b", b, activation);
  const ScalarType out_type = out_dtype.value_or(ScalarType::Float);
  if (out_type == ScalarType::Int) {
    const char* given = a_scale           ? "a_scale"
                        : b_scale         ? "b_scale"
                        : bias            ? "bias"
                        : activation != 0 ? "activation"
                                          : nullptr;
    STD_TORCH_CHECK(given == nullptr, kOp, ": expected no ", given, " with out_dtype int32, the raw accumulator");
  } else {
    STD_TORCH_CHECK(is_float16_or_32(out_type), kOp,
                    ": expected out_dtype to be float32, bfloat16 or float16 or int32, got ", dtype_name(out_type));
  }

  Tensor out = empty_cuda({p.rows, p.n}, out_type, a);
  if (p.rows == 0 || p.n == 0) return out;
  const Rows rows(a);
  p.a = static_cast<const int8_t*>(rows.tensor.const_data_ptr());
  p.a_stride = rows.stride;
  set_out(args, out, p.n);
  p.epilogue = e;
  check_launch(kOp, int8_grouped_matmul(p, current_stream(a)));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykernels, CUDA, m) { m.impl("int8_grouped_matmul", TORCH_BOX(&int8_grouped_matmul_cuda)); }

}  // namespace pykernels::cuda
