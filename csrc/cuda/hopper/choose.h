// Which kernel of schedule.h an int8 product gets on sm_90, by a model of how it would be spread over the SMs. The
// launcher chooses with it, and Python through pykernels._host (pykernels.ops.heuristics).
#pragma once

#include "schedule.h"

namespace pykernels::cuda::hopper {

// What one SM of an H100 does in a cycle: dense INT8 (1,979 TOPS / 132 SMs / 1.83 GHz), bytes from shared memory, and
// an assumed even share of L2 (7.7 TB/s in all), which no GPU has confirmed here.
inline constexpr int64_t kOpsPerCycle = 8192;
inline constexpr int64_t kSharedBytesPerCycle = 128;
inline constexpr int64_t kL2BytesPerCycle = 32;
inline constexpr int64_t kStartCycles = 1500;    // launch of the first loads until the first product
inline constexpr int64_t kEpilogueCycles = 600;  // of a tile, beside the bytes it stores
inline constexpr int64_t kFixupCycles = 1000;    // of a tile cut along K, beside the bytes of its partial sums

// CUTLASS gives a work unit of stream-K at least so many steps, and moves both its ends by less to keep to that.
inline constexpr int64_t kStreamKLeast = 8;

// How a product is spread over the SMs; times in cycles, lengths in steps of the tile's k.
struct Spread {
  int64_t tiles;     // that hold results
  int64_t units;     // SMs that whole clusters can use
  int64_t steps;     // of k, for each tile
  int64_t makespan;  // steps of the SM that works longest; for stream-K within 7 steps of it
  int64_t cycles;    // predicted

  // Thousandths of the SMs' steps that go into tiles: what wave quantisation leaves.
  constexpr int64_t efficiency() const { return 1000 * tiles * steps / (makespan * units); }
};

constexpr int64_t step_cycles(const Shape& s) {
  const int64_t mma = 2LL * s.m * s.n * s.k / kOpsPerCycle;
  const int64_t shared = (s.m / 64) * (64LL + s.n) * s.k / kSharedBytesPerCycle;
  const int64_t l2 = (s.m * s.k / s.cluster_n + s.n * s.k / s.cluster_m) / kL2BytesPerCycle;
  const int64_t slower = mma > shared ? mma : shared;
  return slower > l2 ? slower : l2;
}

constexpr Spread spread(const Shape& s, int64_t m, int64_t n, int64_t k, int64_t sm_count, int64_t out_bytes) {
  const int64_t cluster = s.cluster_m * s.cluster_n;
  const int64_t units = sm_count / cluster * cluster;
  const int64_t tiles_m = ceil_of(m, s.m), tiles_n = ceil_of(n, s.n), steps = k > 0 ? ceil_of(k, s.k) : 1;
  // The grid is whole clusters: a tile outside the matrix keeps its SM busy too.
  const int64_t padded = ceil_of(tiles_m, s.cluster_m) * s.cluster_m * ceil_of(tiles_n, s.cluster_n) * s.cluster_n;
  const int64_t waves = ceil_of(padded, units);
  const int64_t step = step_cycles(s);
  const int64_t epilogue = kEpilogueCycles + s.m * s.n * out_bytes / kL2BytesPerCycle;
  int64_t makespan = waves * steps, exposed = s.pingpong ? epilogue : waves * epilogue;
  const int64_t parts = padded * steps / kStreamKLeast / cluster * cluster;
  if (s.stream_k && padded % units != 0 && parts > 0) {
    makespan = ceil_of(padded * steps, parts < units ? parts : units) + kStreamKLeast - 1;
    exposed += kFixupCycles + 2LL * s.m * s.n * 4 / kL2BytesPerCycle;
  }
  return {tiles_m * tiles_n, units, steps, makespan, kStartCycles + makespan * step + exposed};
}

// TMA wants rows of both operands and of the result on 16 bytes, a cluster its SMs, stream-K something to cut. Pointers
// are the launcher's.
constexpr bool is_legal(Schedule schedule, int64_t m, int64_t n, int64_t k, int64_t sm_count, int64_t out_bytes) {
  const Shape s = shape_of(schedule);
  if (schedule == Schedule::small_m) return m <= kSmallM;
  if (schedule == Schedule::mma_sync) return true;
  if (s.stream_k && k < 2 * kStreamKLeast * s.k) return false;
  return k > 0 && k % 16 == 0 && n * out_bytes % 16 == 0 && sm_count >= s.cluster_m * s.cluster_n && m < (1LL << 31) &&
         n < (1LL << 31);
}

// Of the legal Hopper kernels whose SMs are at most 10 % more idle than the best's, the one predicted fastest.
constexpr Schedule choose(int64_t m, int64_t n, int64_t k, int64_t sm_count, int64_t out_bytes) {
  if (m <= kSmallM) return Schedule::small_m;
  int64_t best = 0;
  for (int i = 0; i < kSchedules; ++i) {
    const Shape s = shape_of(static_cast<Schedule>(i));
    if (s.m == 0 || !is_legal(static_cast<Schedule>(i), m, n, k, sm_count, out_bytes)) continue;
    const int64_t efficiency = spread(s, m, n, k, sm_count, out_bytes).efficiency();
    best = efficiency > best ? efficiency : best;
  }
  Schedule chosen = Schedule::mma_sync;
  int64_t least = 0;
  for (int i = 0; i < kSchedules; ++i) {
    const Shape s = shape_of(static_cast<Schedule>(i));
    if (s.m == 0 || !is_legal(static_cast<Schedule>(i), m, n, k, sm_count, out_bytes)) continue;
    const Spread found = spread(s, m, n, k, sm_count, out_bytes);
    if (10 * found.efficiency() < 9 * best || (chosen != Schedule::mma_sync && found.cycles >= least)) continue;
    chosen = static_cast<Schedule>(i);
    least = found.cycles;
  }
  return chosen;
}

}  // namespace pykernels::cuda::hopper
