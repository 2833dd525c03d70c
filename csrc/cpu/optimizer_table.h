// Fills the table of optimizer_kernels.h for one instruction set.
#pragma once

#include "optimizer_blocks.h"

namespace pykernels::cpu {
namespace {

template <class S>
constexpr OptimizerKernels optimizer_kernels() {
  using enum Algorithm;
  return {
      {update_blocks<S, adam>, update_blocks<S, lamb>, update_blocks<S, lion>, update_blocks<S, sgd>,
       update_blocks<S, adagrad>, update_blocks<S, rmsprop>},
      {norms_blocks<S, adam>, norms_blocks<S, lamb>, norms_blocks<S, lion>, norms_blocks<S, sgd>,
       norms_blocks<S, adagrad>, norms_blocks<S, rmsprop>},
      {squared_norm_of<S, float>, squared_norm_of<S, f16>, squared_norm_of<S, bf16>},
      {scale_values<S, float>, scale_values<S, f16>, scale_values<S, bf16>},
  };
}

}  // namespace
}  // namespace pykernels::cpu
