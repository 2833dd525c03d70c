// What the CPU bindings share: dtype names, cheap allocation, and a tensor seen as rows.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <string>
#include <vector>

#include "../../launchers.h"
#include "../huge_pages.h"

namespace pykernels::cpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// As torch spells it in Python.
inline std::string dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    default:
      return torch::headeronly::toString(dtype);
  }
}

template <class Sizes>
std::string shape_name(const Sizes& sizes) {
  std::string text = "[";
  for (size_t d = 0; d < sizes.size(); ++d) text += (d ? ", " : "") + std::to_string(sizes[d]);
  return text + "]";
}

inline bool is_float16_or_32(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

// Only for dtypes that is_float16_or_32 accepted.
inline DType float_dtype(ScalarType dtype) {
  return dtype == ScalarType::Float ? DType::f32 : dtype == ScalarType::Half ? DType::f16 : DType::bf16;
}

inline void check_float(const char* op, const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(is_float16_or_32(tensor.scalar_type()), op, ": expected ", name,
                  " to be float32, bfloat16 or float16, got ", dtype_name(tensor.scalar_type()));
}

inline void check_dtype(const char* op, const char* name, const Tensor& tensor, ScalarType dtype) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, op, ": expected ", name, " to be ", dtype_name(dtype), ", got ",
                  dtype_name(tensor.scalar_type()));
}

inline void check_cpu(const char* op, const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_cpu(), op, ": expected ", name, " to be on the CPU, as x is");
}

// An uninitialised contiguous tensor. The C shim skips the dispatcher, which torch::stable::empty goes through.
inline Tensor empty_cpu(const std::vector<int64_t>& sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= std::max<int64_t>(sizes[d], 1);
  }
  const auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                         strides.data(), code, aoti_torch_device_type_cpu(), 0,
                                                         &handle));
  return Tensor(handle);
}

// An uninitialised result. Only sizes that malloc maps afresh at every call are worth the hint; a weight that is
// quantised once is then streamed from huge pages ever after.
inline Tensor empty_result(const std::vector<int64_t>& sizes, ScalarType dtype) {
  constexpr int64_t kWorthAdvice = 4 << 20;
  Tensor out = empty_cpu(sizes, dtype);
  const int64_t bytes = out.numel() * static_cast<int64_t>(out.element_size());
  if (bytes >= kWorthAdvice) advise_huge_pages(out.mutable_data_ptr(), bytes);
  return out;
}

// Whether each row is whole lines of 64 bytes.
inline bool on_lines(const Tensor& tensor, int64_t row_elements) {
  return row_elements * static_cast<int64_t>(tensor.element_size()) % 64 == 0 &&
         reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 64 == 0;
}

// Whether a kernel should write `out` past the caches: a result of this size has mostly left them before anyone reads
// it, and an ordinary store first reads the line that it writes, a third of what a copy then moves.
inline bool worth_streaming(const Tensor& out, int64_t row_elements) {
  constexpr int64_t kStreamedBytes = 8 << 20;
  return out.numel() * static_cast<int64_t>(out.element_size()) >= kStreamedBytes && on_lines(out, row_elements);
}

// x [..., K] as M rows with stride 1 inside and one stride between them; copied only when it does not lie that way.
struct Rows {
  Tensor tensor;               // keeps the memory alive
  std::vector<int64_t> sizes;  // of x
  int64_t M = 1;
  int64_t K = 0;
  int64_t stride = 0;

  explicit Rows(const Tensor& x) : tensor(x), sizes(x.sizes().begin(), x.sizes().end()), K(sizes.back()) {
    for (size_t d = 0; d + 1 < sizes.size(); ++d) M *= sizes[d];
    if (!find_stride()) {
      tensor = torch::stable::contiguous(x);
      stride = K;
    }
  }

 private:
  bool find_stride() {
    const auto strides = tensor.strides();
    stride = K;
    if (M == 0 || K == 0) return true;
    if (K > 1 && strides[sizes.size() - 1] != 1) return false;
    int64_t expected = -1;
    for (size_t d = sizes.size() - 1; d-- > 0;) {
      if (sizes[d] == 1) continue;
      if (expected < 0) stride = strides[d];
      if (expected >= 0 && strides[d] != expected) return false;
      expected = strides[d] * sizes[d];
    }
    return true;
  }
};

// The blocks of block_size [b], along the last dimension, or [bm, bk], tiles of a matrix.
struct Blocks {
  int64_t rows = 1;
  int64_t cols = 1;

  Blocks(const char* op, const char* name, const Tensor& x, const std::vector<int64_t>& block_size) {
    STD_TORCH_CHECK(block_size.size() == 1 || block_size.size() == 2, op,
                    ": expected block_size to have 1 or 2 elements, got ", block_size.size());
    for (int64_t size : block_size)
      STD_TORCH_CHECK(size > 0, op, ": expected block_size to be positive, got ", shape_name(block_size));
    STD_TORCH_CHECK(x.dim() >= 1, op, ": expected ", name, " to have at least 1 dimension, got 0");
    STD_TORCH_CHECK(block_size.size() == 1 || x.dim() == 2, op, ": expected ", name,
                    " to have 2 dimensions for a block_size of 2 elements, got shape ", shape_name(x.sizes()));
    if (block_size.size() == 2) rows = block_size[0];
    cols = block_size.back();
  }

  // The shape of one value for each block of a tensor of these sizes.
  std::vector<int64_t> grid(std::vector<int64_t> sizes) const {
    if (rows > 1) sizes[0] = (sizes[0] + rows - 1) / rows;
    sizes.back() = (sizes.back() + cols - 1) / cols;
    return sizes;
  }
};

// Rows a thread must have to be worth waking: about 32 Ki elements.
inline int64_t grain_of(int64_t elements_per_row) {
  return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, elements_per_row));
}

}  // namespace pykernels::cpu
