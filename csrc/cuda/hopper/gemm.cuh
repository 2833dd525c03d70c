// One member of the set in schedule.h as a CUTLASS 3 kernel: TMA into shared memory, WGMMA on int8, FinishSums.
#pragma once

#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include "epilogue.cuh"
#include "launch.h"
#include "scheduler.cuh"

namespace pykernels::cuda::hopper {

// The builder's epilogue with three buffers for subtiles of C and D in place of four: the shared memory this saves is
// one more stage of operands, the fourth of tile_128x256.
template <class Built>
struct ThreeBuffers;
template <int kC, int kD, int kFragment, bool kReuse, bool kDelay, class... Rest>
struct ThreeBuffers<cutlass::epilogue::collective::CollectiveEpilogue<
    cutlass::epilogue::Sm90TmaWarpSpecialized<kC, kD, kFragment, kReuse, kDelay>, Rest...>> {
  static_assert(kD <= 2 && kReuse, "D lies where C lay, and two stores are under way at most");
  using Epilogue = cutlass::epilogue::collective::CollectiveEpilogue<
      cutlass::epilogue::Sm90TmaWarpSpecialized<3, kD, kFragment, kReuse, kDelay>, Rest...>;
};

template <Schedule kSchedule, int kBytes>
struct Product {
  static constexpr Shape kShape = shape_of(kSchedule);
  using Tile = typename Tiling<kSchedule>::Tile;
  using Cluster = typename Tiling<kSchedule>::Cluster;
  using Mainloop = cute::conditional_t<kShape.pingpong, cutlass::gemm::KernelTmaWarpSpecializedPingpong,
                                       cutlass::gemm::KernelTmaWarpSpecializedCooperative>;
  using Store = cute::conditional_t<kShape.pingpong, cutlass::epilogue::TmaWarpSpecialized,
                                    cutlass::epilogue::TmaWarpSpecializedCooperative>;
  using Element = Word<kBytes>;
  static constexpr int kAlignment = 16 / kBytes;  // TMA's 16 bytes

  using CollectiveEpilogue = typename ThreeBuffers<typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, int32_t, float, Element, cutlass::layout::RowMajor, kAlignment,
      Element, cutlass::layout::RowMajor, kAlignment, Store, FinishSums<Tile, kBytes>>::CollectiveOp>::Epilogue;
  using CollectiveMainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, int8_t, cutlass::layout::RowMajor, 16, int8_t,
      cutlass::layout::ColumnMajor, 16, int32_t, Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
          sizeof(typename CollectiveEpilogue::SharedStorage))>,
      Mainloop>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, CollectiveMainloop,
                                                      CollectiveEpilogue, typename Tiling<kSchedule>::Scheduler>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
  static_assert(Kernel::SharedStorageSize <= kSharedLimit);

  static typename Gemm::Arguments arguments(const Int8Matmul& p, int device, int multiprocessors) {
    const Epilogue& e = p.epilogue;
    typename Gemm::Arguments args{};
    args.mode = cutlass::gemm::GemmUniversalMode::kGemm;
    args.problem_shape = {static_cast<int>(p.m), static_cast<int>(p.n), static_cast<int>(p.k), 1};
    args.mainloop.ptr_A = p.a;
    args.mainloop.dA = {p.a_stride, cute::_1{}, 0};
    args.mainloop.ptr_B = p.b;
    args.mainloop.dB = {p.b_stride, cute::_1{}, 0};
    args.epilogue.thread = e;
    // A descriptor of C is made even when C is never read, and has to be valid.
    const bool reads_c = e.residual != nullptr;
    args.epilogue.ptr_C = static_cast<const Element*>(reads_c ? e.residual : e.out);
    args.epilogue.dC = {reads_c ? e.residual_stride : e.out_stride, cute::_1{}, 0};
    args.epilogue.ptr_D = static_cast<Element*>(e.out);
    args.epilogue.dD = {e.out_stride, cute::_1{}, 0};
    args.hw_info.device_id = device;
    args.hw_info.sm_count = multiprocessors;
    Tiling<kSchedule>::set(args.scheduler, p.m, p.n);
    return args;
  }

  static int64_t workspace_bytes(const Int8Matmul& p, int device, int multiprocessors) {
    return static_cast<int64_t>(Gemm::get_workspace_size(arguments(p, device, multiprocessors)));
  }

  static const char* launch(const Int8Matmul& p, int device, int multiprocessors, void* workspace, void* stream) {
    const auto args = arguments(p, device, multiprocessors);
    cutlass::Status status = Gemm::can_implement(args);
    if (status == cutlass::Status::kSuccess) {
      Gemm gemm;
      status = gemm.run(args, workspace, static_cast<cudaStream_t>(stream));
    }
    return status == cutlass::Status::kSuccess ? nullptr : cutlassGetStatusString(status);
  }
};

template <Schedule kSchedule>
int64_t Member<kSchedule>::workspace_bytes(const Int8Matmul& p, int device, int multiprocessors) {
  return element_size(p.epilogue.out_dtype) == 2 ? Product<kSchedule, 2>::workspace_bytes(p, device, multiprocessors)
                                                 : Product<kSchedule, 4>::workspace_bytes(p, device, multiprocessors);
}

template <Schedule kSchedule>
const char* Member<kSchedule>::launch(const Int8Matmul& p, int device, int multiprocessors, void* workspace,
                                      void* stream) {
  return element_size(p.epilogue.out_dtype) == 2
             ? Product<kSchedule, 2>::launch(p, device, multiprocessors, workspace, stream)
             : Product<kSchedule, 4>::launch(p, device, multiprocessors, workspace, stream);
}

}  // namespace pykernels::cuda::hopper
