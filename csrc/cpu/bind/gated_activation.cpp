#include "../../launchers/gated_activation.h"

#include <cstring>
#include <optional>
#include <tuple>

#include "checks.h"

namespace pykernels::cpu {
namespace {

constexpr const char* kForward = "gated_activation";
constexpr const char* kBackward = "gated_activation_backward";
constexpr const char* kQuantized = "gated_activation_quantized";
constexpr int64_t kGrain = 32768;  // elements a thread must have to be worth waking

bool same_shape(const std::vector<int64_t>& sizes, const Tensor& tensor) {
  const auto other = tensor.sizes();
  return std::equal(sizes.begin(), sizes.end(), other.begin(), other.end());
}

// gate and up as rows of I columns: of two tensors, of the halves of one, or gate alone (relu2; up then is gate).
struct Inputs {
  Rows gate;
  std::optional<Rows> second;
  GatedActivation activation;
  DType dtype;
  bool packed;
  std::vector<int64_t> sizes;  // of the result
  int64_t I = 0;

  Inputs(const char* op, const Tensor& gate_in, const std::optional<Tensor>& up_in, int64_t code)
      : gate(checked(op, gate_in, up_in, code)),
        activation(static_cast<GatedActivation>(code)),
        dtype(float_dtype(gate_in.scalar_type())),
        packed(!up_in.has_value() && activation != GatedActivation::relu2),
        sizes(gate.sizes) {
    if (packed) sizes.back() /= 2;
    I = sizes.back();
    if (up_in.has_value()) second.emplace(*up_in);
  }

  const void* gate_data() const { return gate.tensor.const_data_ptr(); }
  const void* up_data() const {
    if (second.has_value()) return second->tensor.const_data_ptr();
    return static_cast<const char*>(gate_data()) + (packed ? I * static_cast<int64_t>(gate.tensor.element_size()) : 0);
  }
  int64_t up_stride() const { return second.has_value() ? second->stride : gate.stride; }
  int64_t elements() const { return gate.M * I; }
  bool contiguous() const { return gate.stride == I && up_stride() == I; }

  GatedForward forward() const {
    GatedForward args;
    args.gate = gate_data();
    args.up = up_data();
    args.gate_stride = gate.stride;
    args.up_stride = up_stride();
    args.K = I;
    args.dtype = dtype;
    args.activation = activation;
    return args;
  }

 private:
  static const Tensor& checked(const char* op, const Tensor& gate, const std::optional<Tensor>& up, int64_t code) {
    STD_TORCH_CHECK(code >= 1 && code <= kGatedActivations, op, ": expected activation to be 1 to ", kGatedActivations,
                    ", got ", code);
    const bool relu2 = static_cast<GatedActivation>(code) == GatedActivation::relu2;
    check_float(op, "gate", gate);
    STD_TORCH_CHECK(gate.dim() >= 1, op, ": expected gate to have at least 1 dimension, got 0");
    if (!up.has_value()) {
      STD_TORCH_CHECK(relu2 || gate.sizes()[gate.dim() - 1] % 2 == 0, op,
                      ": expected a packed gate to have an even last dimension, gate and up, got shape ",
                      shape_name(gate.sizes()));
      return gate;
    }
    STD_TORCH_CHECK(!relu2, op, ": expected no up with relu2, which has one input");
    STD_TORCH_CHECK(up->is_cpu(), op, ": expected up to be on the CPU, as gate is");
    STD_TORCH_CHECK(up->scalar_type() == gate.scalar_type(), op, ": expected up to be ", dtype_name(gate.scalar_type()),
                    ", as gate, got ", dtype_name(up->scalar_type()));
    STD_TORCH_CHECK(same_shape({gate.sizes().begin(), gate.sizes().end()}, *up), op, ": expected up to have shape ",
                    shape_name(gate.sizes()), ", as gate, got ", shape_name(up->sizes()));
    return gate;
  }
};

Tensor gated_activation_cpu(const Tensor& gate, const std::optional<Tensor>& up, int64_t activation) {
  const Inputs in(kForward, gate, up, activation);
  Tensor out = empty_result(in.sizes, gate.scalar_type());
  if (in.elements() == 0) return out;
  GatedForward args = in.forward();
  args.out = out.mutable_data_ptr();
  if (in.contiguous()) args.K = in.elements();
  args.stream = worth_streaming(out, in.I);
  torch::stable::parallel_for(0, in.elements(), kGrain,
                              [&](int64_t begin, int64_t end) { gated_activation(args, begin, end); });
  return out;
}

// The gradient as rows. One value expanded to all, as sum().backward() gives it, becomes one row that all share.
Rows gradient_rows(const Tensor& grad) {
  const auto sizes = grad.sizes(), strides = grad.strides();
  bool one_value = true;
  for (int64_t d = 0; d < grad.dim(); ++d) one_value = one_value && (sizes[d] == 1 || strides[d] == 0);
  if (!one_value || grad.numel() == 0) return Rows(grad);
  const int64_t K = sizes[grad.dim() - 1], bytes = static_cast<int64_t>(grad.element_size());
  Tensor row = empty_cpu({K}, grad.scalar_type());
  for (int64_t k = 0; k < K; ++k)
    std::memcpy(static_cast<char*>(row.mutable_data_ptr()) + k * bytes, grad.const_data_ptr(), bytes);
  Rows rows(row);
  rows.stride = 0;
  return rows;
}

std::tuple<Tensor, Tensor> gated_activation_backward_cpu(const Tensor& grad, const Tensor& gate,
                                                         const std::optional<Tensor>& up, int64_t activation) {
  const Inputs in(kBackward, gate, up, activation);
  STD_TORCH_CHECK(grad.is_cpu(), kBackward, ": expected grad to be on the CPU, as gate is");
  check_dtype(kBackward, "grad", grad, gate.scalar_type());
  STD_TORCH_CHECK(same_shape(in.sizes, grad), kBackward, ": expected grad to have shape ", shape_name(in.sizes),
                  ", as the result, got ", shape_name(grad.sizes()));
  Tensor grad_gate = empty_result(in.gate.sizes, gate.scalar_type());
  Tensor grad_up = empty_result(up.has_value() ? in.sizes : std::vector<int64_t>{0}, gate.scalar_type());
  if (in.elements() == 0) return {grad_gate, grad_up};

  const Rows grad_rows = gradient_rows(grad);
  const GatedForward inputs = in.forward();
  GatedBackward args;
  args.grad = grad_rows.tensor.const_data_ptr();
  args.gate = inputs.gate;
  args.up = inputs.up;
  args.grad_stride = grad_rows.stride;
  args.gate_stride = inputs.gate_stride;
  args.up_stride = inputs.up_stride;
  args.K = in.I;
  args.dtype = in.dtype;
  args.activation = in.activation;
  args.grad_gate = grad_gate.mutable_data_ptr();
  args.grad_gate_stride = in.gate.K;
  args.grad_up = up.has_value() ? grad_up.mutable_data_ptr()
                                : static_cast<char*>(args.grad_gate) +
                                      (in.packed ? in.I * static_cast<int64_t>(gate.element_size()) : 0);
  args.grad_up_stride = up.has_value() ? in.I : in.gate.K;
  if (in.contiguous() && args.grad_stride == in.I) args.K = in.elements();
  args.stream = worth_streaming(grad_gate, in.I) && (!up.has_value() || worth_streaming(grad_up, in.I));
  torch::stable::parallel_for(0, in.elements(), kGrain,
                              [&](int64_t begin, int64_t end) { gated_activation_backward(args, begin, end); });
  return {grad_gate, grad_up};
}

std::tuple<Tensor, Tensor> gated_activation_quantized_cpu(const Tensor& gate, const std::optional<Tensor>& up,
                                                          int64_t activation) {
  const Inputs in(kQuantized, gate, up, activation);
  Tensor q = empty_result(in.sizes, ScalarType::Char);
  Tensor scale = empty_cpu({in.sizes.begin(), in.sizes.end() - 1}, ScalarType::Float);
  GatedQuantized args;
  args.forward = in.forward();
  args.q = static_cast<int8_t*>(q.mutable_data_ptr());
  args.scale = static_cast<float*>(scale.mutable_data_ptr());
  torch::stable::parallel_for(0, in.gate.M, grain_of(in.I),
                              [&](int64_t begin, int64_t end) { gated_activation_quantized(args, begin, end); });
  return {q, scale};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykernels, CPU, m) {
  m.impl("gated_activation", TORCH_BOX(&gated_activation_cpu));
  m.impl("gated_activation_backward", TORCH_BOX(&gated_activation_backward_cpu));
  m.impl("gated_activation_quantized", TORCH_BOX(&gated_activation_quantized_cpu));
}

}  // namespace pykernels::cpu
