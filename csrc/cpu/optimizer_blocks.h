// Walks the blocks of a tensor. float32 parameters and gradients, or bfloat16 ones, are read and written where they
// lie; every other pair, and what rounding took away, goes through short float32 buffers.
#pragma once

#include "optimizer_adam_codes.h"
#include "optimizer_codes.h"
#include "tensor_norms.h"

namespace pykernels::cpu {
namespace {

// States as float32, where they lie or in a buffer.
template <class S>
struct FloatStates {
  float* states[kMostSlots];

  template <int slot>
  typename S::F load(int64_t k, int n) const {
    return n == S::kWidth ? S::load(states[slot] + k) : S::load_tail(states[slot] + k, n);
  }
  template <int slot>
  void store(int64_t k, typename S::F v, int n) const {
    n == S::kWidth ? S::store(states[slot] + k, v) : S::store_tail(states[slot] + k, v, n);
  }
};

// The vector at k, of which n elements are there.
template <bool keep, class States>
struct At {
  States& states;
  int64_t k;
  int n;

  template <int slot>
  auto load() const {
    return states.template load<slot>(k, n);
  }
  template <int slot, class F>
  void store(F v) const {
    if constexpr (keep) states.template store<slot>(k, v, n);
  }
};

// n elements from `from` on of the states; plain as in `advance`.
template <class S, Algorithm A, bool plain, class T, class States>
void step_vectors(const Rule<S>& given, T* p, const T* g, States& kept, int64_t from, int64_t n,
                  const uint16_t* random) {
  // Copies that no store can reach, so that they stay in registers.
  const Rule<S> rule = given;
  States states = kept;
  const auto save = [&](int64_t k, typename S::F v, auto part) {
    if constexpr (std::is_same_v<T, bf16>) {
      if (random != nullptr)
        return store_16<S>(p + k, round_stochastic<S>(v, S::load(random + k)), part ? part : S::kWidth);
    }
    part ? S::store_tail(p + k, v, part) : S::store(p + k, v);
  };
  int64_t k = 0;
  for (; k + S::kWidth <= n; k += S::kWidth) {
    const auto old = S::load(p + k);
    const auto u = advance<S, A, plain>(rule, old, S::load(g + k), At<true, States>{states, from + k, S::kWidth});
    save(k, descend<S>(rule, old, u), std::integral_constant<int, 0>{});
  }
  if (k < n) {
    const int rest = static_cast<int>(n - k);
    const auto old = S::load_tail(p + k, rest);
    const auto u = advance<S, A, plain>(rule, old, S::load_tail(g + k, rest), At<true, States>{states, from + k, rest});
    save(k, descend<S>(rule, old, u), rest);
  }
  kept = states;
}

// What changes the parameters.
template <class S, Algorithm A>
struct Update {
  static constexpr bool kKeep = true;
  Rule<S> rule;
  bool plain = is_plain<S>(rule);

  template <class T, class States>
  void operator()(T* p, const T* g, States& states, int64_t from, int64_t n, const uint16_t* random) const {
    plain ? step_vectors<S, A, true>(rule, p, g, states, from, n, random)
          : step_vectors<S, A, false>(rule, p, g, states, from, n, random);
  }
};

// What adds the squares of parameters and directions to sums: short float32 chains, added up in double.
template <class S, Algorithm A>
struct Norms {
  static constexpr bool kKeep = false;
  Rule<S> rule;
  double (&sums)[2];

  template <class T, class States, class Take>
  void each(const T* p, const T* g, States& states, int64_t from, int64_t n, const Take& take) const {
    int64_t k = 0;
    for (; k + S::kWidth <= n; k += S::kWidth) {
      const auto old = S::load(p + k);
      take(old, advance<S, A, false>(rule, old, S::load(g + k), At<false, States>{states, from + k, S::kWidth}));
    }
    if (k < n) {
      const int rest = static_cast<int>(n - k);
      const auto old = S::load_tail(p + k, rest);
      float u[S::kWidth] = {};
      S::store_tail(
          u, advance<S, A, false>(rule, old, S::load_tail(g + k, rest), At<false, States>{states, from + k, rest}),
          rest);
      take(old, S::load(u));
    }
  }

  template <class T, class States>
  void operator()(T* p, const T* g, States& states, int64_t from, int64_t n, const uint16_t*) const {
    constexpr int64_t kChain = 64 * S::kWidth;
    for (int64_t begin = 0; begin < n; begin += kChain) {
      const int64_t count = std::min(kChain, n - begin);
      auto of_p = S::set1(0.0f), of_u = of_p;
      each(p + begin, g + begin, states, from + begin, count,
           [&](auto old, auto u) { of_p = S::add(of_p, S::mul(old, old)), of_u = S::add(of_u, S::mul(u, u)); });
      const float p_sum = S::reduce_add(of_p), u_sum = S::reduce_add(of_u);
      if (square_sum_is_safe(p_sum) && square_sum_is_safe(u_sum)) {
        sums[0] += static_cast<double>(p_sum), sums[1] += static_cast<double>(u_sum);
      } else {
        each(p + begin, g + begin, states, from + begin, count,
             [&](auto old, auto u) { add_squares<S>(old, sums[0]), add_squares<S>(u, sums[1]); });
      }
    }
  }
};

// n elements from number `offset` of the tensor, `index` of all shards, `from` of the states.
template <class S, class Step, class States>
inline void piece(const OptimizerRule& rule, const OptimizerTensor& tensor, int64_t offset, int64_t index, int n,
                  const Step& step, States& states, int64_t from) {
  const bool rounded = rule.rounding == Rounding::kahan || rule.rounding == Rounding::split_master;
  if (!rounded && rule.param_dtype == DType::bf16 && rule.grad_dtype == DType::bf16) {
    alignas(64) uint16_t random[kPiece];
    const bool stochastic = Step::kKeep && rule.rounding == Rounding::stochastic;
    if (stochastic) random_bits<S>(rule, tensor, index, n, random);
    return step(static_cast<bf16*>(tensor.param) + offset, static_cast<const bf16*>(tensor.grad) + offset, states, from,
                n, stochastic ? random : nullptr);
  }
  alignas(64) float p_buffer[kPiece], g_buffer[kPiece];
  float* p = read_param<S>(rule, tensor, offset, n, p_buffer);
  step(p, widen<S>(tensor.grad, rule.grad_dtype, offset, n, g_buffer), states, from, n, nullptr);
  if (Step::kKeep) write_param<S>(rule, tensor, offset, index, n, p);
}

// Blocks [begin, end) of a tensor.
template <class S, Algorithm A, class Step>
void each_block(const OptimizerRule& rule, const OptimizerTensor& tensor, int64_t begin, int64_t end, float* scratch,
                const Step& step) {
  const int64_t per_row = tensor.blocks_of_row(rule.block);
  const bool direct = rule.param_dtype == DType::f32 && rule.grad_dtype == DType::f32 &&
                      rule.rounding != Rounding::kahan && rule.state != StateKind::bf16;
  for (int64_t b = begin; b < end; ++b) {
    const int64_t row = b / per_row, column = b % per_row * rule.block;
    const int64_t count = std::min(rule.block, tensor.columns - column);
    const int64_t at = row * tensor.columns + column, index = tensor.start + row * tensor.row_stride + column;
    const auto pieces = [&](const auto& run) {
      const int64_t length = direct ? count : kPiece;
      for (int64_t k = 0; k < count; k += length) run(k, static_cast<int>(std::min(length, count - k)));
    };
    if (rule.state == StateKind::codes) {
      CodeStates<S, A> states(rule, tensor, b, at, scratch);
      pieces([&](int64_t k, int n) { piece<S>(rule, tensor, at + k, index + k, n, step, states, k); });
      if (Step::kKeep) states.finish(rule, tensor, b, at, count, Dither<S>(tensor, rule.seed, index));
      continue;
    }
    pieces([&](int64_t k, int n) {
      alignas(64) float buffer[kMostSlots][kPiece];
      FloatStates<S> states{};
      for (int j = 0; j < rule.slots; ++j)
        states.states[j] = rule.state == StateKind::f32
                               ? static_cast<float*>(tensor.state[j]) + at + k
                               : const_cast<float*>(widen<S>(tensor.state[j], DType::bf16, at + k, n, buffer[j]));
      piece<S>(rule, tensor, at + k, index + k, n, step, states, 0);
      if (Step::kKeep && rule.state == StateKind::bf16)
        for (int j = 0; j < rule.slots; ++j)
          write_bf16_state<S>(rule, tensor, at + k, index + k, n, buffer[j], tensor.state[j]);
    });
  }
}

template <class S, Algorithm A>
void update_blocks(const OptimizerRule& rule, const OptimizerTensor& tensor, int64_t begin, int64_t end,
                   float* scratch) {
  const Rule<S> r(rule, tensor);
  if constexpr (A == Algorithm::adam)
    if (is_adam_codes<S>(rule, r)) return update_adam_codes<S>(rule, tensor, begin, end, scratch, r);
  each_block<S, A>(rule, tensor, begin, end, scratch, Update<S, A>{r});
}

template <class S, Algorithm A>
void norms_blocks(const OptimizerRule& rule, const OptimizerTensor& tensor, int64_t begin, int64_t end, float* scratch,
                  double (&sums)[2]) {
  each_block<S, A>(rule, tensor, begin, end, scratch, Norms<S, A>{Rule<S>(rule, tensor), sums});
}

}  // namespace
}  // namespace pykernels::cpu
