// out = act(gate) * up, and its gradients. relu2 (relu squared) has no up. All tensors share one dtype: f32, f16, bf16.
#pragma once

#include "../launchers.h"

namespace pykernels {

// The numbers are part of the operator schema (pykernels/ops/_enums.py holds the names).
enum class GatedActivation : int { relu = 1, gelu = 2, gelu_tanh = 3, silu = 4, relu2 = 5 };
inline constexpr int kGatedActivations = 5;

// Rows of K elements with stride 1 inside; strides are between rows and may be 0.
struct GatedForward {
  const void* gate = nullptr;
  const void* up = nullptr;
  int64_t gate_stride = 0;
  int64_t up_stride = 0;
  int64_t K = 0;
  DType dtype = DType::f32;
  GatedActivation activation = GatedActivation::silu;
  void* out = nullptr;  // [M, K]
  bool stream = false;  // write past the caches
};

// grad_gate = grad * up * act'(gate), grad_up = grad * act(gate).
struct GatedBackward {
  const void* grad = nullptr;
  const void* gate = nullptr;
  const void* up = nullptr;
  int64_t grad_stride = 0;
  int64_t gate_stride = 0;
  int64_t up_stride = 0;
  int64_t K = 0;
  DType dtype = DType::f32;
  GatedActivation activation = GatedActivation::silu;
  void* grad_gate = nullptr;
  void* grad_up = nullptr;
  int64_t grad_gate_stride = 0;
  int64_t grad_up_stride = 0;
  bool stream = false;  // write past the caches; grad_gate and grad_up then lie alike on lines of 64 bytes
};

// The result, rounded to dtype, quantised as quantize_rowwise does it. out is not used.
struct GatedQuantized {
  GatedForward forward;
  int8_t* q = nullptr;     // [M, K]
  float* scale = nullptr;  // [M]
};

namespace cpu {
// Elements [begin, end) in row-major order: a range may begin and end inside a row.
void gated_activation(const GatedForward& args, int64_t begin, int64_t end);
void gated_activation_backward(const GatedBackward& args, int64_t begin, int64_t end);
void gated_activation_quantized(const GatedQuantized& args, int64_t begin, int64_t end);  // rows [begin, end)
}  // namespace cpu

}  // namespace pykernels
