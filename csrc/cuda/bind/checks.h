// What the CUDA bindings share: device checks, allocation on the device, the current stream, the epilogue's arguments.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <optional>
#include <string>
#include <vector>

#include "../../cpu/bind/checks.h"
#include "../launchers.h"

namespace pykernels::cuda {

using pykernels::cpu::check_dtype;
using pykernels::cpu::check_float;
using pykernels::cpu::dtype_name;
using pykernels::cpu::float_dtype;
using pykernels::cpu::is_float16_or_32;
using pykernels::cpu::Rows;
using pykernels::cpu::ScalarType;
using pykernels::cpu::shape_name;
using pykernels::cpu::Tensor;
using torch::stable::accelerator::DeviceGuard;

constexpr int64_t kMaxK = 131071;

inline void check_device(const char* op, const char* name, const Tensor& tensor, const char* other_name,
                         const Tensor& other) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == other.get_device_index(), op, ": expected ", name,
                  " on the device of ", other_name, " (cuda:", other.get_device_index(), "), got ",
                  tensor.is_cuda() ? "cuda:" + std::to_string(tensor.get_device_index()) : std::string("another kind"));
}

inline void check_vector(const char* op, const char* name, const Tensor& tensor, int64_t length, const char* of) {
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.numel() == length, op, ": expected ", name, " to have shape [", length,
                  "], one element for each ", of, ", got ", shape_name(tensor.sizes()));
}

inline void check_k(const char* op, int64_t k) {
  STD_TORCH_CHECK(k <= kMaxK, op, ": expected K to be at most ", kMaxK, ", so that int32 accumulation is exact, got ",
                  k, ": split K");
}

// An uninitialised contiguous tensor on the device of `like`.
inline Tensor empty_cuda(const std::vector<int64_t>& sizes, ScalarType dtype, const Tensor& like) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= std::max<int64_t>(sizes[d], 1);
  }
  const auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                         strides.data(), code, aoti_torch_device_type_cuda(),
                                                         like.get_device_index(), &handle));
  return Tensor(handle);
}

inline void* current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return stream;
}

inline void check_launch(const char* op, const char* error) {
  STD_TORCH_CHECK(error == nullptr, op, ": the CUDA kernel could not be launched: ", error != nullptr ? error : "");
}

inline DType out_dtype_of(ScalarType dtype) { return dtype == ScalarType::Int ? DType::i32 : float_dtype(dtype); }

// Tensors that the epilogue points into, kept alive until the launch.
struct EpilogueArgs {
  Epilogue epilogue;
  std::vector<Tensor> held;

  const void* hold(const Tensor& tensor) {
    held.push_back(torch::stable::contiguous(tensor));
    return held.back().const_data_ptr();
  }
};

// bias [n] and residual [*rows, n] in any float dtype, and the activation's number.
inline void set_bias_residual(const char* op, EpilogueArgs& args, const Tensor& input,
                              const std::vector<int64_t>& out_sizes, const std::optional<Tensor>& bias,
                              const std::optional<Tensor>& residual, int64_t activation) {
  STD_TORCH_CHECK(activation >= 0 && activation <= 4, op, ": expected activation to be 0 to 4, got ", activation);
  args.epilogue.activation = static_cast<Activation>(activation);
  const int64_t n = out_sizes.back();
  if (bias.has_value()) {
    check_float(op, "bias", *bias);
    check_device(op, "bias", *bias, "the input", input);
    check_vector(op, "bias", *bias, n, "output column");
    args.epilogue.bias = args.hold(*bias);
    args.epilogue.bias_dtype = float_dtype(bias->scalar_type());
  }
  if (residual.has_value()) {
    check_float(op, "residual", *residual);
    check_device(op, "residual", *residual, "the input", input);
    const auto sizes = residual->sizes();
    STD_TORCH_CHECK(std::vector<int64_t>(sizes.begin(), sizes.end()) == out_sizes, op,
                    ": expected residual to have shape ", shape_name(out_sizes), ", as the result, got ",
                    shape_name(sizes));
    args.epilogue.residual = args.hold(*residual);
    args.epilogue.residual_stride = n;
    args.epilogue.residual_dtype = float_dtype(residual->scalar_type());
  }
}

inline void set_out(EpilogueArgs& args, const Tensor& out, int64_t n) {
  args.epilogue.out = out.mutable_data_ptr();
  args.epilogue.out_stride = n;
  args.epilogue.out_dtype = out_dtype_of(out.scalar_type());
}

}  // namespace pykernels::cuda
