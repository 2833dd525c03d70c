// CUTLASS's tile schedulers, as csrc/cuda/hopper configures them, run block by block on the CPU. Each line of the input
// is "schedule m n k multiprocessors"; for each, every tile of the matrix must be stored exactly once and every step of
// K of it be added exactly once. Prints "tiles, blocks, steps of the block that works longest, blocks that share a tile
// at most", or what was wrong.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include <cutlass/cutlass.h>
#include <cutlass/gemm/gemm.h>

#include "cuda/hopper/scheduler.cuh"

namespace hopper = pykernels::cuda::hopper;
using hopper::Schedule;

struct Range {
  int64_t begin, count;
  bool stores;
};

// What every block did to every tile of the grid, those outside the matrix included.
struct Work {
  std::map<std::pair<int, int>, std::vector<Range>> tiles;
  std::map<uint64_t, int64_t> steps;  // by block
};

template <class Scheduler, class Params>
void run_static(Work& work, const Params& params, dim3 grid, int cluster_m, int cluster_n, int64_t steps) {
  const uint64_t blocks = uint64_t{grid.x} * grid.y;
  for (unsigned x = 0; x < grid.x; ++x) {
    for (unsigned y = 0; y < grid.y; ++y) {
      const bool along_n = params.raster_order_ == Params::RasterOrder::AlongN;
      const uint64_t first = along_n ? x + uint64_t{y} * grid.x : uint64_t{x} * grid.y + y;
      // The two warpgroups of a pingpong kernel take turns: one the even, one the odd visits of this loop.
      for (uint64_t linear = first; linear < params.blocks_per_problem_; linear += blocks) {
        const auto [m, n] = Scheduler::get_work_idx_m_and_n(
            params.divmod_cluster_shape_minor_.divide(linear), params.divmod_cluster_shape_major_,
            params.divmod_cluster_shape_minor_, params.divmod_cluster_blk_major_, params.log_swizzle_size_,
            params.raster_order_, x % cluster_m, y % cluster_n);
        work.tiles[{m, n}].push_back({0, steps, true});
        work.steps[first] += steps;
      }
    }
  }
}

template <class Scheduler, class Params>
void run_stream_k(Work& work, const Params& params, dim3 grid, int cluster_m, int cluster_n) {
  const uint64_t blocks = uint64_t{grid.x} * grid.y;
  for (unsigned x = 0; x < grid.x; ++x) {
    for (unsigned y = 0; y < grid.y; ++y) {
      const bool along_n = params.raster_order_ == Params::RasterOrder::AlongN;
      const uint64_t first = along_n ? x + uint64_t{y} * grid.x : uint64_t{x} * grid.y + y;
      const dim3 in_cluster(x % cluster_m, y % cluster_n, 0);
      uint32_t unit_start = 0;
      for (uint64_t linear = first;; linear += blocks) {
        auto tile = Scheduler::get_current_work_for_linear_idx(unit_start, linear, in_cluster, params);
        if (!tile.is_valid()) break;
        do {
          work.tiles[{tile.M_idx, tile.N_idx}].push_back(
              {tile.K_idx, tile.k_tile_count, Scheduler::compute_epilogue(tile, params)});
          work.steps[first] += tile.k_tile_count;
        } while (Scheduler::continue_current_work_for_linear_idx(linear, unit_start, in_cluster, tile, params));
      }
    }
  }
}

template <Schedule kSchedule>
std::string check(int64_t m, int64_t n, int64_t k, int multiprocessors) {
  using Tiling = hopper::Tiling<kSchedule>;
  constexpr hopper::Shape kShape = Tiling::kShape;
  using Scheduler = typename cutlass::gemm::kernel::detail::TileSchedulerSelector<
      typename Tiling::Scheduler, cutlass::arch::Sm90, typename Tiling::Tile, typename Tiling::Cluster>::Scheduler;
  const auto problem = cute::make_shape(static_cast<int>(m), static_cast<int>(n), static_cast<int>(k), 1);
  cutlass::KernelHardwareInfo hardware;
  hardware.sm_count = multiprocessors;
  typename Scheduler::Arguments arguments{};
  Tiling::set(arguments, m, n);
  if (!Scheduler::can_implement(arguments)) return "CUTLASS refuses the arguments";
  const auto params = Scheduler::to_underlying_arguments(problem, typename Tiling::Tile{}, typename Tiling::Cluster{},
                                                         hardware, arguments, nullptr);
  const dim3 grid = Scheduler::get_grid_shape(params, problem, typename Tiling::Tile{}, typename Tiling::Cluster{},
                                              hardware, arguments);
  const int64_t steps = hopper::ceil_of(k, kShape.k);
  Work work;
  if constexpr (kShape.stream_k) {
    run_stream_k<Scheduler>(work, params, grid, kShape.cluster_m, kShape.cluster_n);
  } else {
    run_static<Scheduler>(work, params, grid, kShape.cluster_m, kShape.cluster_n, steps);
  }
  const int64_t rows = hopper::ceil_of(m, kShape.m), columns = hopper::ceil_of(n, kShape.n);
  size_t shared = 0;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      auto& ranges = work.tiles[{static_cast<int>(i), static_cast<int>(j)}];
      const std::string where = "tile " + std::to_string(i) + ", " + std::to_string(j);
      std::sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
      int64_t reached = 0, stores = 0;
      for (const Range& range : ranges) {
        if (range.begin != reached) return where + " has no step " + std::to_string(reached) + ", or has it twice";
        reached += range.count;
        stores += range.stores;
      }
      if (reached != steps) return where + " ends at step " + std::to_string(reached);
      if (stores != 1 || !ranges.back().stores) return where + " is stored " + std::to_string(stores) + " times";
      shared = std::max(shared, ranges.size());
    }
  }
  int64_t longest = 0;
  for (const auto& [block, count] : work.steps) longest = std::max(longest, count);
  const size_t padded = hopper::ceil_of(rows, kShape.cluster_m) * kShape.cluster_m *
                        hopper::ceil_of(columns, kShape.cluster_n) * kShape.cluster_n;
  if (work.tiles.size() != padded)
    return std::to_string(work.tiles.size()) + " tiles are computed, not " + std::to_string(padded);
  return std::to_string(rows * columns) + " " + std::to_string(grid.x * grid.y) + " " + std::to_string(longest) + " " +
         std::to_string(shared);
}

std::string dispatch(int schedule, int64_t m, int64_t n, int64_t k, int multiprocessors) {
  switch (static_cast<Schedule>(schedule)) {
    case Schedule::tile_64x64:
      return check<Schedule::tile_64x64>(m, n, k, multiprocessors);
    case Schedule::tile_64x128:
      return check<Schedule::tile_64x128>(m, n, k, multiprocessors);
    case Schedule::tile_128x128:
      return check<Schedule::tile_128x128>(m, n, k, multiprocessors);
    case Schedule::tile_128x256:
      return check<Schedule::tile_128x256>(m, n, k, multiprocessors);
    case Schedule::stream_128x128:
      return check<Schedule::stream_128x128>(m, n, k, multiprocessors);
    default:
      return "no Hopper kernel";
  }
}

int main() {
  int schedule = 0, multiprocessors = 0;
  long long m = 0, n = 0, k = 0;
  while (std::scanf("%d %lld %lld %lld %d", &schedule, &m, &n, &k, &multiprocessors) == 5) {
    std::printf("%s\n", dispatch(schedule, m, n, k, multiprocessors).c_str());
  }
}
