// The launchers of the Hopper kernels: plain functions, like those of ../launchers.h. Built only with CUTLASS,
// for 9.0a.
#pragma once

#include "../launchers.h"
#include "schedule.h"

namespace pykernels::cuda::hopper {

// One member of the set, for results of 2 or 4 bytes; instantiated in int8_matmul_<member>.cu.
template <Schedule kSchedule>
struct Member {
  static int64_t workspace_bytes(const Int8Matmul& p, int device, int multiprocessors);
  static const char* launch(const Int8Matmul& p, int device, int multiprocessors, void* workspace, void* stream);
};

// What serves p on the current device, and the scratch memory it needs.
struct Plan {
  Schedule schedule = Schedule::mma_sync;
  int device = 0;
  int multiprocessors = 0;
  int64_t workspace_bytes = 0;
};
Plan plan_int8_matmul(const Int8Matmul& p);
const char* int8_matmul(const Int8Matmul& p, const Plan& plan, void* workspace, void* stream);

}  // namespace pykernels::cuda::hopper
