// int8_block_scaled_matmul: all of args, whose struct the CPU shares.
#pragma once

#include "../launchers/int8_block_scaled.h"
#include "launchers.h"

namespace pykernels::cuda {

const char* int8_block_scaled_matmul(const Int8BlockScaled& args, void* stream);

}  // namespace pykernels::cuda
