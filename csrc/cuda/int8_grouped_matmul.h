// int8_grouped_matmul: a [rows, k], sorted by expert, by b [experts, n, k]; strides are those of launchers.h.
#pragma once

#include "launchers.h"

namespace pykernels::cuda {

struct Int8GroupedMatmul {
  const int8_t* a = nullptr;
  int64_t a_stride = 0;
  const int8_t* b = nullptr;
  int64_t b_step = 0;  // from an expert to the next
  int64_t b_stride = 0;
  const void* counts = nullptr;  // [experts], on the device; a negative one is 0, and groups end with the rows
  bool counts_are_wide = false;  // int64, else int32
  int64_t experts = 0;
  int64_t rows = 0;
  int64_t n = 0;
  int64_t k = 0;
  Epilogue epilogue;      // b_scale and bias are [experts, n]; no zero point, no residual
  int64_t row_tiles = 0;  // set by the launcher
};
// Rows that no expert counts become 0.
const char* int8_grouped_matmul(const Int8GroupedMatmul& p, void* stream);

}  // namespace pykernels::cuda
