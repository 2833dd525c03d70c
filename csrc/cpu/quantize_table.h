// Fills a table of quantize_kernels.h for one instruction set.
#pragma once

#include "dequantize.h"
#include "quantize_asymmetric.h"
#include "quantize_blockwise.h"
#include "quantize_both.h"
#include "quantize_colwise.h"
#include "quantize_kernels.h"
#include "quantize_rowwise.h"

namespace pykernels::cpu {
namespace {

template <class S>
constexpr QuantizeKernels quantize_kernels() {
  return {
      {quantize_rowwise_rows<S, float>, quantize_rowwise_rows<S, f16>, quantize_rowwise_rows<S, bf16>},
      {absmax_rows<S, float>, absmax_rows<S, f16>, absmax_rows<S, bf16>},
      {quantize_colwise_rows<S, float>, quantize_colwise_rows<S, f16>, quantize_colwise_rows<S, bf16>},
      {quantize_both_rows<S, float>, quantize_both_rows<S, f16>, quantize_both_rows<S, bf16>},
      {quantize_blockwise_rows<S, float>, quantize_blockwise_rows<S, f16>, quantize_blockwise_rows<S, bf16>},
      {quantize_asymmetric_rows<S, float>, quantize_asymmetric_rows<S, f16>, quantize_asymmetric_rows<S, bf16>},
      {dequantize_rows<S, float>, dequantize_rows<S, f16>, dequantize_rows<S, bf16>},
  };
}

}  // namespace
}  // namespace pykernels::cpu
