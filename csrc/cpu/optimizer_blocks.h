// Walks the blocks of a tensor: brings what is not float32 into short buffers, makes the step there or in place, and
// rounds back.
#pragma once

#include "optimizer_codes.h"
#include "optimizer_kernels.h"
#include "optimizer_rules.h"
#include "tensor_norms.h"

namespace pykernels::cpu {
namespace {

// A vector at k of each state.
template <class S>
struct WholeStates {
  float* const* states;
  int64_t k;

  typename S::F load(int slot) const { return S::load(states[slot] + k); }
  void store(int slot, typename S::F v) const { S::store(states[slot] + k, v); }
};

template <class S>
struct PartStates {
  float* const* states;
  int64_t k;
  int n;

  typename S::F load(int slot) const { return S::load_tail(states[slot] + k, n); }
  void store(int slot, typename S::F v) const { S::store_tail(states[slot] + k, v, n); }
};

template <class States>
struct ReadOnly : States {
  template <class F>
  void store(int, F) const {}
};

// The step of n elements, all float32.
template <class S, Algorithm A>
void step_span(const Rule<S>& rule, float* p, const float* g, float* const* states, int64_t n) {
  int64_t k = 0;
  for (; k + S::kWidth <= n; k += S::kWidth) {
    const auto old = S::load(p + k);
    S::store(p + k, descend<S>(rule, old, advance<S, A>(rule, old, S::load(g + k), WholeStates<S>{states, k})));
  }
  if (k < n) {
    const int rest = static_cast<int>(n - k);
    const auto old = S::load_tail(p + k, rest);
    const auto u = advance<S, A>(rule, old, S::load_tail(g + k, rest), PartStates<S>{states, k, rest});
    S::store_tail(p + k, descend<S>(rule, old, u), rest);
  }
}

// Adds the squares of n parameters and directions to sums: short float32 chains, added up in double.
template <class S, Algorithm A>
void norms_span(const Rule<S>& rule, const float* p, const float* g, float* const* states, int64_t n,
                double (&sums)[2]) {
  const auto each = [&](int64_t begin, int64_t end, const auto& take) {
    int64_t k = begin;
    for (; k + S::kWidth <= end; k += S::kWidth) {
      const auto old = S::load(p + k);
      take(old, advance<S, A>(rule, old, S::load(g + k), ReadOnly<WholeStates<S>>{{states, k}}));
    }
    if (k < end) {
      const int rest = static_cast<int>(end - k);
      const auto old = S::load_tail(p + k, rest);
      float u[S::kWidth] = {};
      S::store_tail(u, advance<S, A>(rule, old, S::load_tail(g + k, rest), ReadOnly<PartStates<S>>{{states, k, rest}}),
                    rest);
      take(old, S::load(u));
    }
  };
  constexpr int64_t kChain = 64 * S::kWidth;
  for (int64_t begin = 0; begin < n; begin += kChain) {
    const int64_t end = std::min(n, begin + kChain);
    auto of_p = S::set1(0.0f), of_u = of_p;
    each(begin, end, [&](auto old, auto u) { of_p = S::add(of_p, S::mul(old, old)), of_u = S::add(of_u, S::mul(u, u)); });
    const float p_sum = S::reduce_add(of_p), u_sum = S::reduce_add(of_u);
    if (square_sum_is_safe(p_sum) && square_sum_is_safe(u_sum)) {
      sums[0] += static_cast<double>(p_sum), sums[1] += static_cast<double>(u_sum);
    } else {
      each(begin, end, [&](auto old, auto u) { add_squares<S>(old, sums[0]), add_squares<S>(u, sums[1]); });
    }
  }
}

// Calls step(p, g, states, n) for each piece of blocks [begin, end); keep: rounds back what it changed.
template <class S, bool keep, class Step>
inline void each_piece(const OptimizerRule& rule, const OptimizerTensor& tensor, int64_t begin, int64_t end,
                       float* scratch, const Step& step) {
  alignas(64) float p_buffer[kPiece], g_buffer[kPiece], state_buffer[kMostSlots][kPiece];
  const int64_t per_row = tensor.blocks_of_row(rule.block), stride = optimizer_scratch(rule);
  const bool direct = rule.param_dtype == DType::f32 && rule.grad_dtype == DType::f32 &&
                      rule.state == StateKind::f32 && rule.rounding != Rounding::kahan;
  for (int64_t b = begin; b < end; ++b) {
    const int64_t row = b / per_row, column = b % per_row * rule.block;
    const int64_t count = std::min(rule.block, tensor.columns - column);
    const int64_t at = row * tensor.columns + column, from = tensor.start + row * tensor.row_stride + column;
    const auto codes = [&](int j) { return static_cast<char*>(tensor.state[j]) + at; };
    if (rule.state == StateKind::codes)
      for (int j = 0; j < rule.slots; ++j)
        decode_block<S>(rule.slot_signed[j], codes(j), tensor.scale[j][b], count, scratch + j * stride);
    for (int64_t k = 0; k < count;) {
      const int64_t offset = at + k;
      const int n = static_cast<int>(direct ? count : std::min<int64_t>(kPiece, count - k));
      float* p = read_param<S>(rule, tensor, offset, n, p_buffer);
      const float* g = widen<S>(tensor.grad, rule.grad_dtype, offset, n, g_buffer);
      float* states[kMostSlots] = {};
      for (int j = 0; j < rule.slots; ++j)
        states[j] = rule.state == StateKind::codes ? scratch + j * stride + k
                    : rule.state == StateKind::f32
                        ? static_cast<float*>(tensor.state[j]) + offset
                        : const_cast<float*>(widen<S>(tensor.state[j], DType::bf16, offset, n, state_buffer[j]));
      step(p, g, states, n);
      if constexpr (keep) {
        write_param<S>(rule, tensor, offset, from + k, n, p);
        if (rule.state == StateKind::bf16)
          for (int j = 0; j < rule.slots; ++j)
            write_bf16_state<S>(rule, tensor, offset, from + k, n, states[j], tensor.state[j]);
      }
      k += n;
    }
    if (keep && rule.state == StateKind::codes)
      for (int j = 0; j < rule.slots; ++j)
        encode_block<S>(rule.slot_signed[j], scratch + j * stride, count, Dither<S>(tensor, rule.seed, from), codes(j),
                        tensor.scale[j] + b);
  }
}

template <class S, Algorithm A>
void update_blocks(const OptimizerRule& rule, const OptimizerTensor& tensor, int64_t begin, int64_t end,
                   float* scratch) {
  const Rule<S> vectors(rule, tensor);
  each_piece<S, true>(rule, tensor, begin, end, scratch, [&](float* p, const float* g, float* const* states, int n) {
    step_span<S, A>(vectors, p, g, states, n);
  });
}

template <class S, Algorithm A>
void norms_blocks(const OptimizerRule& rule, const OptimizerTensor& tensor, int64_t begin, int64_t end, float* scratch,
                  double (&sums)[2]) {
  const Rule<S> vectors(rule, tensor);
  each_piece<S, false>(rule, tensor, begin, end, scratch, [&](float* p, const float* g, float* const* states, int n) {
    norms_span<S, A>(vectors, p, g, states, n, sums);
  });
}

}  // namespace
}  // namespace pykernels::cpu
