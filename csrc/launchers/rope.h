// rope: (x1, x2) -> (x1 * cos - x2 * sin, x2 * cos + x1 * sin) for the pairs of the first 2 * pairs dimensions.
#pragma once

#include "../launchers.h"

namespace pykernels {

// Query or key: [B, S, heads, D] with stride 1 along D; out is contiguous.
struct RopeTensor {
  const void* x = nullptr;  // null: absent
  int64_t batch_stride = 0;
  int64_t seq_stride = 0;
  int64_t head_stride = 0;
  int64_t heads = 0;
  void* out = nullptr;
};

struct Rope {
  RopeTensor q;
  RopeTensor k;
  DType dtype = DType::f32;
  int64_t S = 0;
  int64_t D = 0;
  int64_t pairs = 0;
  const void* cos = nullptr;  // [rows, pairs]
  const void* sin = nullptr;
  DType table_dtype = DType::f32;
  int64_t cos_stride = 0;  // between rows; 1 within a row
  int64_t sin_stride = 0;
  const int64_t* position_ids = nullptr;  // row b, s at b * ids_stride + s; null: s
  int64_t ids_stride = 0;
  bool interleaved = false;
  bool inverse = false;
  bool stream = false;  // write past the caches: out is larger than they are, and each head is whole lines of 64 bytes
};

namespace cpu {
void rope(const Rope& args, int64_t begin, int64_t end);  // positions [begin, end) of B * S
}

}  // namespace pykernels
