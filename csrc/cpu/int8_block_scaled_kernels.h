// The table that each instruction set fills for int8_block_scaled_matmul, and the workspace its stages share.
#pragma once

#include "../launchers/int8_block_scaled.h"

namespace pykernels::cpu {

struct Int8BlockScaledKernels {
  Int8MatmulPlan (*plan)(const Int8BlockScaled& args);
  void (*rows)(const Int8BlockScaled& args, const Int8MatmulPlan& plan, char* workspace, int64_t begin, int64_t end);
  void (*tiles)(const Int8BlockScaled& args, const Int8MatmulPlan& plan, char* workspace, int64_t begin, int64_t end);
};

extern const Int8BlockScaledKernels kInt8BlockScaledPortable;
extern const Int8BlockScaledKernels kInt8BlockScaledAvx2;
extern const Int8BlockScaledKernels kInt8BlockScaledAvx512;

// The workspace: M prepared rows, then a sum for each block of each: [blocks][M].
struct ScaledWorkspace {
  int8_t* rows;
  int32_t* sum;

  static int64_t bytes(const Int8BlockScaled& args, int64_t row_bytes) {
    return (args.M * row_bytes + 63) / 64 * 64 + args.blocks * args.M * 4;
  }

  ScaledWorkspace(char* base, const Int8BlockScaled& args, int64_t row_bytes)
      : rows(reinterpret_cast<int8_t*>(base)),
        sum(reinterpret_cast<int32_t*>(base + (args.M * row_bytes + 63) / 64 * 64)) {}
};

// What the int32 sum of a block of row m and a column of n's tile is multiplied with.
inline float block_scale(const Int8BlockScaled& args, int64_t m, int64_t n, int64_t block) {
  return args.a_scale[m * args.blocks + block] * args.b_scale[n / kScaledBlock * args.blocks + block];
}

}  // namespace pykernels::cpu
