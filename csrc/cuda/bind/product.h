// The int8 product of both bindings: the Hopper kernels where they are built, with the scratch memory that they ask
// for.
#pragma once

#include "checks.h"
#ifdef PYKERNELS_HOPPER
#include "../hopper/launch.h"
#endif

namespace pykernels::cuda {

inline void run_product(const char* op, const Int8Matmul& p, [[maybe_unused]] const Tensor& input, void* stream) {
#ifdef PYKERNELS_HOPPER
  const hopper::Plan plan = hopper::plan_int8_matmul(p);
  // Freed at once: the allocator hands it out again only to work that follows on this stream.
  std::optional<Tensor> workspace;
  if (plan.workspace_bytes > 0) workspace = empty_cuda({plan.workspace_bytes}, ScalarType::Byte, input);
  check_launch(op, hopper::int8_matmul(p, plan, workspace ? workspace->mutable_data_ptr() : nullptr, stream));
#else
  check_launch(op, int8_matmul(p, stream));
#endif
}

}  // namespace pykernels::cuda
