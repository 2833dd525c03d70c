// Fills a table of norm_kernels.h for one instruction set.
#pragma once

#include "norm_backward.h"
#include "norm_forward.h"
#include "norm_kernels.h"

namespace pykernels::cpu {
namespace {

template <class S>
constexpr NormKernels norm_kernels() {
  return {
      {norm_forward_rows<S, float>, norm_forward_rows<S, f16>, norm_forward_rows<S, bf16>},
      {norm_backward_rows<S, float>, norm_backward_rows<S, f16>, norm_backward_rows<S, bf16>},
      {norm_column_sums_of<S, float>, norm_column_sums_of<S, f16>, norm_column_sums_of<S, bf16>},
  };
}

}  // namespace
}  // namespace pykernels::cpu
