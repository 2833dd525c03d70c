// Runs an INT8 product over torch's thread pool, and the checks that its two bindings share.
#pragma once

#include <atomic>
#include <cstddef>
#include <memory>
#include <optional>

#include "../scratch.h"
#include "checks.h"

namespace pykernels::cpu {

// One thread's share of the items, from which others take when theirs is done.
struct alignas(64) Share {
  std::atomic<int64_t> next{0};
  int64_t end = 0;
};

// f(state, begin, end) over [0, items), handed out a few at a time, so that a thread that is held up delays nobody;
// state is what start() gave that thread. A thread takes items that lie together: the same ones of every stage, and of
// the next call, so that what it wrote is still its own to read and to write.
template <class Start, class F>
void parallel_items(int64_t items, int64_t at_once, const Start& start, const F& f) {
  const int64_t batches = (items + at_once - 1) / at_once;
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), batches);
  if (threads <= 1) {
    if (items > 0) f(start(), 0, items);
    return;
  }
  const std::unique_ptr<Share[]> shares(new Share[threads]);
  for (int64_t t = 0; t < threads; ++t) {
    shares[t].next = t * batches / threads;
    shares[t].end = (t + 1) * batches / threads;
  }
  torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    std::optional<decltype(start())> state;  // of a thread that comes too late for any item, nothing is prepared
    for (int64_t t = first; t < last; ++t)
      for (int64_t other = 0; other < threads; ++other) {
        Share& share = shares[(t + other) % threads];
        for (int64_t batch; (batch = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;) {
          if (!state) state.emplace(start());
          f(*state, batch * at_once, std::min(items, (batch + 1) * at_once));
        }
      }
  });
}

template <class F>
void parallel_items(int64_t items, int64_t at_once, const F& f) {
  const auto none = [] { return nullptr; };
  parallel_items(items, at_once, none, [&](std::nullptr_t, int64_t begin, int64_t end) { f(begin, end); });
}

// Work below this many products of int8 is not worth waking a thread for.
constexpr int64_t kSerialProducts = 1 << 18;
// Quantising or copying fewer elements than this likewise.
constexpr int64_t kSerialElements = 1 << 16;

inline char* thread_workspace(int64_t bytes) {
  static thread_local Scratch scratch;
  return scratch.get(bytes);
}

// Both stages of a plan; small ones stay on the calling thread.
template <class Rows, class Tiles>
void run_stages(const Int8MatmulPlan& plan, int64_t M, int64_t N, int64_t K, const Rows& rows, const Tiles& tiles) {
  const int64_t tiles_at_once = M * N * K <= kSerialProducts ? plan.tile_items + 1 : 1;
  if (M * K <= kSerialElements) {
    // Every thread prepares all rows for itself, which takes no longer than fetching them from another's cache.
    const auto prepared = [&] {
      char* workspace = thread_workspace(plan.workspace_bytes);
      rows(workspace, 0, plan.row_items);
      return workspace;
    };
    return parallel_items(plan.tile_items, tiles_at_once, prepared, tiles);
  }
  char* workspace = thread_workspace(plan.workspace_bytes);
  parallel_items(plan.row_items, plan.row_items < 64 ? 1 : 4,
                 [&](int64_t begin, int64_t end) { rows(workspace, begin, end); });
  parallel_items(plan.tile_items, tiles_at_once, [&](int64_t begin, int64_t end) { tiles(workspace, begin, end); });
}

inline const void* offset_by(const void* p, DType dtype, int64_t index) {
  static constexpr int64_t kBytes[] = {4, 2, 2, 1, 4};
  return p == nullptr ? nullptr : static_cast<const char*>(p) + index * kBytes[static_cast<int>(dtype)];
}

inline Epilogue epilogue_from(const Epilogue& whole, int64_t m0) {
  Epilogue e = whole;
  if (e.a_scale != nullptr) e.a_scale += m0 * e.a_scale_stride;
  if (e.a_zero_point != nullptr) e.a_zero_point += m0 * e.a_zero_point_stride;
  e.residual = offset_by(e.residual, e.residual_dtype, m0 * e.residual_stride);
  e.out = const_cast<void*>(offset_by(e.out, e.out_dtype, m0 * e.out_stride));
  return e;
}

inline void run_int8_matmul(const Int8Matmul& args) {
  if (args.M == 0 || args.N == 0) return;
  const int64_t at_most = int8_matmul_block_rows(args.K);
  for (int64_t m0 = 0; m0 < args.M; m0 += at_most) {
    Int8Matmul block = args;
    block.M = std::min(at_most, args.M - m0);
    block.a = offset_by(args.a, args.a_dtype, m0 * args.a_stride);
    block.epilogue = epilogue_from(args.epilogue, m0);
    const Int8MatmulPlan plan = plan_int8_matmul(block);
    run_stages(
        plan, block.M, block.N, block.K,
        [&](char* workspace, int64_t begin, int64_t end) { int8_matmul_rows(block, plan, workspace, begin, end); },
        [&](char* workspace, int64_t begin, int64_t end) { int8_matmul_tiles(block, plan, workspace, begin, end); });
  }
}

constexpr int64_t kLargestK = 131071;  // 2^31 / 128^2, so that int32 never overflows

inline Activation check_activation(const char* op, int64_t activation) {
  STD_TORCH_CHECK(activation >= 0 && activation <= 4, op, ": expected activation to be 0 to 4, got ", activation);
  return static_cast<Activation>(activation);
}

inline void check_k(const char* op, int64_t K) {
  STD_TORCH_CHECK(K <= kLargestK, op, ": expected K to be at most ", kLargestK,
                  ", so that int32 accumulation is exact, got ", K, ": split K");
}

// A contiguous vector with one element for each of `count` things.
inline Tensor check_vector(const char* op, const char* name, const Tensor& tensor, ScalarType dtype, int64_t count,
                           const char* what) {
  check_dtype(op, name, tensor, dtype);
  check_cpu(op, name, tensor);
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.numel() == count, op, ": expected ", name, " to have shape [", count,
                  "], one element for each ", what, ", got ", shape_name(tensor.sizes()));
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// The same, or one element for all, which has stride 0 in the epilogue.
inline Tensor check_one_or_each(const char* op, const char* name, const Tensor& tensor, ScalarType dtype, int64_t count,
                                const char* what, int64_t* stride) {
  check_dtype(op, name, tensor, dtype);
  check_cpu(op, name, tensor);
  const int64_t numel = tensor.numel();
  STD_TORCH_CHECK(numel == 1 || (tensor.dim() == 1 && numel == count), op, ": expected ", name,
                  " to have 1 element or shape [", count, "], one for each ", what, ", got ",
                  shape_name(tensor.sizes()));
  *stride = numel == 1 ? 0 : 1;
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline Tensor check_bias(const char* op, const Tensor& bias, int64_t N, Epilogue* epilogue) {
  check_float(op, "bias", bias);
  Tensor values = check_vector(op, "bias", bias, bias.scalar_type(), N, "output column");
  epilogue->bias = values.const_data_ptr();
  epilogue->bias_dtype = float_dtype(bias.scalar_type());
  return values;
}

// residual has the sizes of the result and is seen as its rows; the returned Rows keeps it alive.
inline Rows check_residual(const char* op, const Tensor& residual, const std::vector<int64_t>& sizes,
                           Epilogue* epilogue) {
  check_float(op, "residual", residual);
  check_cpu(op, "residual", residual);
  const auto got = residual.sizes();
  STD_TORCH_CHECK(got.size() == sizes.size() && std::equal(sizes.begin(), sizes.end(), got.begin()), op,
                  ": expected residual to have shape ", shape_name(sizes), ", as the result, got ", shape_name(got));
  Rows rows(residual);
  epilogue->residual = rows.tensor.const_data_ptr();
  epilogue->residual_dtype = float_dtype(residual.scalar_type());
  epilogue->residual_stride = rows.stride;
  return rows;
}

inline DType check_out_dtype(const char* op, ScalarType dtype, bool raw_allowed) {
  STD_TORCH_CHECK(is_float16_or_32(dtype) || (raw_allowed && dtype == ScalarType::Int), op,
                  ": expected out_dtype to be float32, bfloat16", raw_allowed ? ", float16 or int32" : " or float16",
                  ", got ", dtype_name(dtype));
  return dtype == ScalarType::Int ? DType::i32 : float_dtype(dtype);
}

// int8 [rows, K], rows of any stride; a copy when it lies otherwise.
inline Tensor check_codes(const char* op, const char* name, const Tensor& tensor) {
  check_dtype(op, name, tensor, ScalarType::Char);
  check_cpu(op, name, tensor);
  STD_TORCH_CHECK(tensor.dim() == 2, op, ": expected ", name, " to have 2 dimensions, got ", tensor.dim());
  return tensor.stride(1) == 1 || tensor.size(1) <= 1 ? tensor : torch::stable::contiguous(tensor);
}

inline void check_same_k(const char* op, const char* name, const Tensor& tensor, const char* other, int64_t K) {
  STD_TORCH_CHECK(tensor.size(1) == K, op, ": expected ", name, " to have shape [N, ", K, "], with the K of ", other,
                  ", got ", shape_name(tensor.sizes()));
}

}  // namespace pykernels::cpu
