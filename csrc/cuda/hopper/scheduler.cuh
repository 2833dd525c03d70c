// How CUTLASS is told to hand out the tiles of a member of the set. tests/hopper_scheduler runs these schedulers on the
// CPU with the same arguments.
#pragma once

#include <cutlass/gemm/kernel/tile_scheduler.hpp>

#include "schedule.h"

namespace pykernels::cuda::hopper {

template <Schedule kSchedule>
struct Tiling {
  static constexpr Shape kShape = shape_of(kSchedule);
  static_assert(kShape.m > 0, "this schedule is not a Hopper kernel");
  using Tile = cute::Shape<cute::Int<kShape.m>, cute::Int<kShape.n>, cute::Int<kShape.k>>;
  using Cluster = cute::Shape<cute::Int<kShape.cluster_m>, cute::Int<kShape.cluster_n>, cute::_1>;
  using Scheduler =
      cute::conditional_t<kShape.stream_k, cutlass::gemm::StreamKScheduler, cutlass::gemm::PersistentScheduler>;

  // Neighbours in time lie in one band and share rows of both operands in L2. Sums of int32 do not depend on their
  // order: partial sums may arrive as they come.
  template <class Arguments>
  static void set(Arguments& scheduler, int64_t m, int64_t n) {
    scheduler.max_swizzle_size = swizzle(kShape, m, n);
    if constexpr (kShape.stream_k) {
      using Params = cutlass::gemm::kernel::detail::PersistentTileSchedulerSm90StreamKParams;
      scheduler.reduction_mode = Params::ReductionMode::Nondeterministic;
      scheduler.decomposition_mode = Params::DecompositionMode::StreamK;
    }
  }
};

}  // namespace pykernels::cuda::hopper
