// The epilogue of the Hopper products as one node of CUTLASS's epilogue visitors. A tree of stock nodes would be
// another kernel for every dtype of bias, residual and result and for every operand left out; here those are switches
// at run time, uniform over the grid, and only the width of a result element is a template parameter: C (the residual)
// and D (the result) travel through TMA as bare 16- or 32-bit words. The arithmetic is csrc/cuda/epilogue.cuh's,
// operation by operation, so that every kernel gives the same bits.
#pragma once

#include <cutlass/cutlass.h>
#include <cutlass/epilogue/fusion/sm90_visitor_tma_warpspecialized.hpp>

#include "../epilogue.cuh"

namespace pykernels::cuda::hopper {

// kBytes-wide words as they lie in memory.
template <int kBytes>
using Word = cute::conditional_t<kBytes == 2, uint16_t, int32_t>;

__device__ __forceinline__ uint16_t to_word(float v, DType dtype, uint16_t) {
  return dtype == DType::f16 ? float_to_half(v) : float_to_bfloat16(v);
}
__device__ __forceinline__ int32_t to_word(float v, DType, int32_t) { return static_cast<int32_t>(float_to_bits(v)); }

__device__ __forceinline__ float from_word(uint16_t v, DType dtype) {
  return dtype == DType::f16 ? to_float(Half{v}) : to_float(BFloat16{v});
}
__device__ __forceinline__ float from_word(int32_t v, DType) { return bits_to_float(static_cast<uint32_t>(v)); }

template <Activation kActivation, int kSize>
__device__ __forceinline__ void activate_all(float (&v)[kSize]) {
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < kSize; ++i) v[i] = activate(v[i], kActivation);
}

template <class TileShape, int kBytes>
struct FinishSums {
  static constexpr int kM = cute::size<0>(TileShape{});
  static constexpr int kN = cute::size<1>(TileShape{});

  struct Term {  // of a column, what is multiplied and then added; an absent one is 1 or -0, which change no bit
    float scale;
    float bias;
  };

  // Read by every thread of the tile: a row's terms by four lanes, a column's by eight.
  struct SharedStorage {
    alignas(16) Term column[kN];
    int32_t column_sum[kN];
    float row_scale[kM];
    int32_t row_zero_point[kM];
  };

  using Arguments = Epilogue;
  using Params = Epilogue;

  template <class Problem>
  static constexpr Params to_underlying_arguments(const Problem&, const Arguments& args, void*) {
    return args;
  }
  template <class Problem>
  static bool can_implement(const Problem&, const Arguments&) {
    return true;
  }
  template <class Problem>
  static size_t get_workspace_size(const Problem&, const Arguments&) {
    return 0;
  }
  template <class Problem>
  static cutlass::Status initialize_workspace(const Problem&, const Arguments&, void*, cudaStream_t,
                                              cutlass::CudaHostAdapter* = nullptr) {
    return cutlass::Status::kSuccess;
  }

  CUTLASS_HOST_DEVICE FinishSums() {}
  CUTLASS_HOST_DEVICE FinishSums(const Params& params, const SharedStorage& storage)
      : params(&params), storage(const_cast<SharedStorage*>(&storage)) {}

  CUTLASS_DEVICE bool is_C_load_needed() const { return params->residual != nullptr; }
  CUTLASS_DEVICE bool is_producer_load_needed() const { return is_C_load_needed(); }

  template <class... Args>
  CUTLASS_DEVICE auto get_producer_load_callbacks(const cutlass::epilogue::fusion::detail::ProducerLoadArgs<Args...>&) {
    return cutlass::epilogue::fusion::detail::EmptyProducerLoadCallbacks{};
  }

  template <class Residual, class Coordinates>
  struct Callbacks : cutlass::epilogue::fusion::detail::EmptyConsumerStoreCallbacks {
    const Params& e;
    SharedStorage& terms;
    const Residual& residual;  // this thread's part of C, of the current subtile
    Coordinates coordinates;   // of this thread's elements, from its first one
    int thread, threads;
    int64_t first_m, first_n;  // of the tile
    int rows, columns;         // of the tile that exist
    int own_m, own_n;          // of this thread's first element, within the tile

    CUTLASS_DEVICE Callbacks(const Params& e, SharedStorage& terms, const Residual& residual, Coordinates coordinates,
                             int thread, int threads, int64_t first_m, int64_t first_n, int rows, int columns,
                             int own_m, int own_n)
        : e(e),
          terms(terms),
          residual(residual),
          coordinates(coordinates),
          thread(thread),
          threads(threads),
          first_m(first_m),
          first_n(first_n),
          rows(rows),
          columns(columns),
          own_m(own_m),
          own_n(own_n) {}

    // What lies beyond the matrix is never stored, but has to be a number that no instruction traps on.
    CUTLASS_DEVICE void begin() {
      if (e.out_dtype == DType::i32) return;
      for (int i = thread; i < kN; i += threads) {
        const int64_t n = first_n + i;
        const bool exists = i < columns;
        terms.column[i] = {exists && e.b_scale != nullptr ? e.b_scale[n * e.b_scale_stride] : 1.0f,
                           exists && e.bias != nullptr ? load_float(e.bias, e.bias_dtype, n) : -0.0f};
        if (e.a_zero_point != nullptr) terms.column_sum[i] = exists ? e.b_sum[n] : 0;
      }
      for (int i = thread; i < kM; i += threads) {
        const int64_t m = first_m + i;
        const bool exists = i < rows;
        terms.row_scale[i] = exists && e.a_scale != nullptr ? e.a_scale[m * e.a_scale_stride] : 1.0f;
        if (e.a_zero_point != nullptr) {
          terms.row_zero_point[i] = exists ? e.a_zero_point[m * e.a_zero_point_stride] : 0;
        }
      }
    }
    CUTLASS_DEVICE bool begin_sync_needed() const { return e.out_dtype != DType::i32; }

    template <int kSize>
    CUTLASS_DEVICE cutlass::Array<Word<kBytes>, kSize> visit(const cutlass::Array<int32_t, kSize>& sums, int part,
                                                             int epi_m, int epi_n) {
      cutlass::Array<Word<kBytes>, kSize> result;
      if constexpr (kBytes == 4) {
        if (e.out_dtype == DType::i32) return sums;
      }
      const auto where = coordinates(cute::_, cute::_, cute::_, epi_m, epi_n);
      int m[kSize], n[kSize];
      float v[kSize];
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kSize; ++i) {
        const auto at = where(part * kSize + i);
        m[i] = own_m + cute::get<0>(at);
        n[i] = own_n + cute::get<1>(at);
        v[i] = __int2float_rn(sums[i]);
      }
      if (e.a_zero_point != nullptr) {
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < kSize; ++i) {
          v[i] = __ll2float_rn(sums[i] - static_cast<int64_t>(terms.row_zero_point[m[i]]) * terms.column_sum[n[i]]);
        }
      }
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kSize; ++i) {
        const Term column = terms.column[n[i]];
        v[i] = __fadd_rn(__fmul_rn(__fmul_rn(v[i], terms.row_scale[m[i]]), column.scale), column.bias);
      }
      switch (e.activation) {  // once for the fragment, not for each of its elements
        case Activation::relu:
          activate_all<Activation::relu>(v);
          break;
        case Activation::gelu:
          activate_all<Activation::gelu>(v);
          break;
        case Activation::gelu_tanh:
          activate_all<Activation::gelu_tanh>(v);
          break;
        case Activation::silu:
          activate_all<Activation::silu>(v);
          break;
        default:
          break;
      }
      if (e.residual != nullptr) {
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < kSize; ++i) {
          v[i] = __fadd_rn(v[i], from_word(static_cast<Word<kBytes>>(residual(part * kSize + i)), e.residual_dtype));
        }
      }
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kSize; ++i) result[i] = to_word(v[i], e.out_dtype, Word<kBytes>{});
      return result;
    }
  };

  template <bool kReferenceSource, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(
      const cutlass::epilogue::fusion::detail::ConsumerStoreArgs<Args...>& args) {
    const int problem_m = static_cast<int>(cute::get<0>(args.problem_shape_mnkl));
    const int problem_n = static_cast<int>(cute::get<1>(args.problem_shape_mnkl));
    const int rows = static_cast<int>(cute::get<0>(args.residue_cD));
    const int columns = static_cast<int>(cute::get<1>(args.residue_cD));
    // args.tCrC's type, not its copy: the collective refills it before each subtile.
    return Callbacks<cute::remove_cvref_t<decltype(args.tCrC)>, cute::remove_cvref_t<decltype(args.tCcD)>>(
        *params, *storage, args.tCrC, args.tCcD, args.thread_idx, static_cast<int>(cute::size(args.tiled_copy)),
        problem_m - rows, problem_n - columns, rows, columns, rows - static_cast<int>(cute::get<0>(args.residue_tCcD)),
        columns - static_cast<int>(cute::get<1>(args.residue_tCcD)));
  }

  const Params* params = nullptr;
  SharedStorage* storage = nullptr;
};

}  // namespace pykernels::cuda::hopper
