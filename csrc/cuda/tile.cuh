// What the tiled products share: the block's shape, operands into shared memory, sums out of it.
#pragma once

#include "epilogue.cuh"
#include "layout.cuh"

namespace pykernels::cuda {

// A block of kWarpsM x kWarpsN warps makes a tile of kM x kN; a stage holds kBytesA and kBytesB bytes of each row.
template <int kM_, int kN_, int kWarpsM, int kWarpsN, int kBytesA_, int kBytesB_, int kStages_>
struct Shape {
  static constexpr int kM = kM_;
  static constexpr int kN = kN_;
  static constexpr int kBytesA = kBytesA_;
  static constexpr int kBytesB = kBytesB_;
  static constexpr int kStages = kStages_;
  static constexpr int kThreads = 32 * kWarpsM * kWarpsN;
  static constexpr int kWarpM = kM / kWarpsM;
  static constexpr int kWarpN = kN / kWarpsN;
  static constexpr int kWarpColumns = kWarpsN;
  static constexpr int kFragmentsM = kWarpM / 16;
  static constexpr int kFragmentsN = kWarpN / 8;
  static constexpr int kStageBytesA = kM * kBytesA;
  static constexpr int kStageBytes = kStageBytesA + kN * kBytesB;
  // Sums leave through shared memory; 8 extra words a row keep the stores of a warp off each other's banks.
  static constexpr int kOutStride = kN + 8;
  static constexpr int kOutBytes = kM * kOutStride * 4;
  static constexpr int kSharedBytes = kStages * kStageBytes > kOutBytes ? kStages * kStageBytes : kOutBytes;
  static_assert(kWarpM % 16 == 0 && kWarpN % 16 == 0);
};

// kRows rows of one operand, bytes at to at + kRowBytes - 1, into a stage; zeros beyond the last row and the last byte.
// source is the first of them, of which `rows` exist. kAligned: source and its stride (in bytes) lie on 16.
template <int kRows, int kRowBytes, int kThreads, bool kAligned>
__device__ __forceinline__ void load_tile(unsigned char* stage, const void* source, int64_t stride, int rows, int at,
                                          int row_bytes) {
  constexpr int kChunks = kRowBytes / 16;
  static_assert(kRows * kChunks % kThreads == 0 && kThreads / kChunks % 8 == 0);
  const int row = threadIdx.x / kChunks;
  const int chunk = threadIdx.x % kChunks;
  const int from = at + chunk * 16;
  const int8_t* first = static_cast<const int8_t*>(source);
#pragma unroll
  for (int i = 0; i < kRows * kChunks / kThreads; ++i) {
    const int below = i * (kThreads / kChunks);
    const int left = row + below < rows ? row_bytes - from : 0;
    unsigned char* target = stage + tile_offset_from<kRowBytes>(below, row, chunk);
    // With nothing left to read the address only has to be a valid one.
    const int8_t* p = left > 0 ? first + (row + below) * stride : first;
    if (kAligned) {
      cp_async_16(target, left > 0 ? p + from : p, max(0, min(16, left)));
    } else {
      store16(target, load_row_chunk<false, false>(p, from, left > 0 ? row_bytes : from));
    }
  }
}

// How many of the kRows rows from first on exist.
template <int kRows>
__device__ __forceinline__ int rows_left(int64_t rows, int64_t first) {
  return rows - first < kRows ? static_cast<int>(rows - first) : kRows;
}

// Fragments into shared memory as [kM][kOutStride], for the epilogue to read row by row.
template <typename S, typename Acc>
__device__ __forceinline__ void store_fragments(Acc* sums, const Acc (&acc)[S::kFragmentsM][S::kFragmentsN][4],
                                                int warp_m, int warp_n) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < S::kFragmentsM; ++i) {
#pragma unroll
    for (int j = 0; j < S::kFragmentsN; ++j) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        sums[(warp_m + i * 16 + acc_row(lane, r)) * S::kOutStride + warp_n + j * 8 + acc_col(lane, r)] = acc[i][j][r];
      }
    }
  }
}

}  // namespace pykernels::cuda
