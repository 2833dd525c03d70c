// Fills a table of cross_entropy_kernels.h for one instruction set.
#pragma once

#include "cross_entropy_kernels.h"
#include "cross_entropy_rows.h"

namespace pykernels::cpu {
namespace {

template <class S>
constexpr CrossEntropyKernels cross_entropy_kernels() {
  return {
      {{cross_entropy_rows<S, float, false>, cross_entropy_rows<S, float, true>},
       {cross_entropy_rows<S, f16, false>, cross_entropy_rows<S, f16, true>},
       {cross_entropy_rows<S, bf16, false>, cross_entropy_rows<S, bf16, true>}},
      {{cross_entropy_update_rows<S, float, false>, cross_entropy_update_rows<S, float, true>},
       {cross_entropy_update_rows<S, f16, false>, cross_entropy_update_rows<S, f16, true>},
       {cross_entropy_update_rows<S, bf16, false>, cross_entropy_update_rows<S, bf16, true>}},
      {{cross_entropy_backward_rows<S, float, false>, cross_entropy_backward_rows<S, float, true>},
       {cross_entropy_backward_rows<S, f16, false>, cross_entropy_backward_rows<S, f16, true>},
       {cross_entropy_backward_rows<S, bf16, false>, cross_entropy_backward_rows<S, bf16, true>}},
  };
}

}  // namespace
}  // namespace pykernels::cpu
