// Fills a table of quantize_kernels.h for one instruction set.
#pragma once

#include "quantize_kernels.h"
#include "quantize_rowwise.h"

namespace pykernels::cpu {
namespace {

template <class S>
constexpr QuantizeKernels quantize_kernels() {
  return {
      {quantize_rowwise_rows<S, float>, quantize_rowwise_rows<S, f16>, quantize_rowwise_rows<S, bf16>},
  };
}

}  // namespace
}  // namespace pykernels::cpu
