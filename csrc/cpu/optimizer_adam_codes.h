// Adam and AdamW with both moments in codes, as most models are trained. The division waits, as the codes do, until the
// block's maxima are known, and the second half of a block's work runs beside the first half of the next one's: the
// chains of roots and quotients are too long for a processor to find enough of them in one half.
#pragma once

#include "optimizer_codes.h"

namespace pykernels::cpu {
namespace {

enum class ParamKind { f32, bf16_nearest, bf16_stochastic, split_master };

// Parameters and gradients of one type, n elements from k on, at most a vector.
template <class S, ParamKind kind>
struct AdamParam {
  using F = typename S::F;
  using I = typename S::I;
  using T = std::conditional_t<kind == ParamKind::f32, float, bf16>;

  T* param;
  const T* grad;
  uint16_t* low;  // of split_master
  I key;          // of bf16_stochastic

  F load_grad(int64_t k, int n) const { return n == S::kWidth ? S::load(grad + k) : S::load_tail(grad + k, n); }
  F load(int64_t k, int n) const {
    if constexpr (kind == ParamKind::split_master) {
      const I high = load_16<S>(reinterpret_cast<const uint16_t*>(param) + k, n);
      const I rest = load_16<S>(reinterpret_cast<const int16_t*>(low) + k, n);
      return S::from_bits(S::add(S::template shift_left<16>(high), rest));
    } else {
      return n == S::kWidth ? S::load(param + k) : S::load_tail(param + k, n);
    }
  }
  typename S::Two load2(int64_t k) const {
    if constexpr (kind == ParamKind::split_master)
      return S::load2_split(reinterpret_cast<const uint16_t*>(param) + k, low + k);
    else
      return S::load2(param + k);
  }
  void store2(int64_t k, typename S::Two v, typename S::TwoI word) const {
    uint16_t* words = reinterpret_cast<uint16_t*>(param) + k;
    if constexpr (kind == ParamKind::bf16_stochastic) {
      S::store2_high(words, add_random<S>(v.a, param_bits<S>(word.a, key)),
                     add_random<S>(v.b, param_bits<S>(word.b, key)));
    } else if constexpr (kind == ParamKind::split_master) {
      const I a = S::bits(v.a), b = S::bits(v.b), half = S::set1(0x8000);
      S::store2_high(words, S::add(a, half), S::add(b, half));
      S::store2_low(low + k, a, b);
    } else {
      S::store2(param + k, v);
    }
  }
  // word: the dither's.
  void store(int64_t k, F v, I word, int n) const {
    if constexpr (kind == ParamKind::bf16_stochastic) {
      store_16<S>(param + k, round_stochastic<S>(v, param_bits<S>(word, key)), n);
    } else if constexpr (kind == ParamKind::split_master) {
      store_16<S>(param + k, S::template shift_right<16>(S::add(S::bits(v), S::set1(0x8000))), n);
      store_16<S>(low + k, S::bit_and(S::bits(v), S::set1(0xffff)), n);
    } else {
      n == S::kWidth ? S::store(param + k, v) : S::store_tail(param + k, v, n);
    }
  }
};

// Whether AdamCodes does what the rule asks for.
template <class S>
inline bool is_adam_codes(const OptimizerRule& rule, const Rule<S>& r) {
  const bool same = rule.param_dtype == rule.grad_dtype && rule.param_dtype != DType::f16;
  return rule.state == StateKind::codes && same && rule.rounding != Rounding::kahan && !r.scaled && !r.maximize &&
         !r.coupled && !r.amsgrad;
}

template <class S, ParamKind kind>
class AdamCodes {
  using F = typename S::F;
  using I = typename S::I;
  using T = typename AdamParam<S, kind>::T;
  static constexpr int kVectors = 4, kGroup = kVectors * S::kWidth;
  static constexpr int64_t kAhead = 1024;

 public:
  AdamCodes(const OptimizerRule& rule, const OptimizerTensor& tensor, const Rule<S>& r)
      : rest1_(r.rest1),
        beta2_(r.beta2),
        rest2_(r.rest2),
        root_(r.root),
        eps_(r.eps),
        length_(r.length),
        decay_(r.decoupled ? r.decay : S::set1(1.0f)) {
    param_ = {static_cast<T*>(tensor.param), static_cast<const T*>(tensor.grad), static_cast<uint16_t*>(tensor.extra),
              S::set1(static_cast<int32_t>(param_key(tensor, rule.seed)))};
    first_codes_ = static_cast<int8_t*>(tensor.state[0]), second_codes_ = static_cast<uint8_t*>(tensor.state[1]);
  }

  // Blocks [begin, end) of the tensor.
  void run(const OptimizerRule& rule, const OptimizerTensor& tensor, int64_t begin, int64_t end, float* scratch) const {
    // A copy, and blocks, that no store can reach, so that they stay in registers: all that takes them is inlined.
    const AdamCodes self = *this;
    const int64_t per_row = tensor.blocks_of_row(rule.block), room = optimizer_scratch(rule);
    int64_t row = begin / per_row, column = begin % per_row * rule.block;
    Block now{}, before{};
    for (int64_t b = begin; b <= end; ++b) {
      now.n = 0;
      if (b < end) {
        now.at = row * tensor.columns + column, now.n = std::min(rule.block, tensor.columns - column);
        now.first = scratch + (b & 1) * 2 * room, now.root = now.first + room;
        now.first_step = S::set1(step_of(tensor.scale[0][b] / kSignedTop));
        now.second_step = S::set1(step_of(tensor.scale[1][b] / kUnsignedTop));
        now.first_most = now.root_most = S::zero();
        now.dither = Dither<S>(tensor, rule.seed, tensor.start + row * tensor.row_stride + column);
        if ((column += rule.block) >= tensor.columns) column = 0, ++row;
      }
      int64_t k = 0;
      const int64_t both = std::min(now.n, before.n);
      for (; k + kGroup <= both; k += kGroup) self.update_group(now, k), self.finish_group(before, k);
      self.finish(before, k);
      self.update(now, k);
      if (b == end) break;
      const BlockScale first(S::reduce_max(now.first_most), kSignedTop);
      const BlockScale root(S::reduce_max(S::bit_and(now.root_most, S::set1(0x7fffffff))), kUnsignedTop);
      tensor.scale[0][b] = first.scale, tensor.scale[1][b] = root.scale;
      now.first_live = first.inverse != 0.0f, now.root_live = root.inverse != 0.0f;
      now.first_inverse = S::set1(first.inverse), now.root_inverse = S::set1(root.inverse);
      before = now;
    }
  }

 private:
  // A NaN of a given scale may have bits that store2 would carry into the sign.
  static float step_of(float v) { return v == v ? v : std::numeric_limits<float>::quiet_NaN(); }

  struct Block {
    int64_t at, n;  // its first element, and how many
    float *first, *root;
    F first_step, second_step, first_inverse, root_inverse;
    I first_most, root_most;
    bool first_live, root_live;
    Dither<S> dither;
  };

  // New moments, the second as its root, into scratch; square: c |c| of the first one's code c.
  inline __attribute__((always_inline)) void update_vector(Block& x, int64_t k, F square, F code, F g) const {
    const F old = S::mul(code, x.second_step);
    F m = S::mul(square, x.first_step);
    m = S::add(m, S::mul(S::sub(g, m), rest1_));
    const F root = S::sqrt(S::add(S::mul(S::mul(old, old), beta2_), S::mul(S::mul(g, g), rest2_)));
    S::store(x.first + k, m), S::store(x.root + k, root);
    // Only a NaN has the sign of a root.
    x.first_most = S::max(x.first_most, S::abs_bits(m)), x.root_most = S::max_unsigned(x.root_most, S::bits(root));
  }
  inline __attribute__((always_inline)) void update_group(Block& x, int64_t k) const {
    // Memory's own prefetchers stop at the end of each page of each of the four arrays.
    const int64_t ahead = x.at + k + kAhead;
#pragma GCC unroll 4
    for (int64_t i = 0; i < kGroup; i += 64 / static_cast<int64_t>(sizeof(*param_.param)))
      __builtin_prefetch(param_.grad + ahead + i), __builtin_prefetch(param_.param + ahead + i, 1);
    __builtin_prefetch(first_codes_ + ahead, 1), __builtin_prefetch(second_codes_ + ahead, 1);
#pragma GCC unroll 2
    for (int64_t i = 0; i < kGroup; i += 2 * S::kWidth) {
      const auto square = S::template load2_squares<T>(first_codes_ + x.at + k + i);
      const auto code = S::template load2_codes<T>(second_codes_ + x.at + k + i);
      const auto g = S::load2(param_.grad + x.at + k + i);
      update_vector(x, k + i, square.a, code.a, g.a), update_vector(x, k + i + S::kWidth, square.b, code.b, g.b);
    }
  }
  // From k on.
  inline __attribute__((always_inline)) void update(Block& x, int64_t k) const {
    for (; k + kGroup <= x.n; k += kGroup) update_group(x, k);
    for (; k < x.n; k += S::kWidth) {
      const int rest = static_cast<int>(std::min<int64_t>(S::kWidth, x.n - k));
      const F c = S::to_float(load_8<S>(first_codes_ + x.at + k, rest));
      const F code = S::to_float(load_8<S>(second_codes_ + x.at + k, rest));
      update_vector(x, k, S::mul(c, S::abs(c)), code, param_.load_grad(x.at + k, rest));
    }
  }

  // The parameter p after the step.
  inline __attribute__((always_inline)) F descended(F p, F m, F root) const {
    const F u = S::div(m, S::add(S::mul(root, root_), eps_));
    return S::sub(S::mul(p, decay_), S::mul(u, length_));
  }
  // Parameters, and the codes of their moments.
  inline __attribute__((always_inline)) void finish_group(Block& x, int64_t k) const {
    I first[kVectors], second[kVectors], exact[kVectors];
    const typename S::TwoI words = x.dither.template next_pair<S::template kEvenOdd<T>, kGroup>();
#pragma GCC unroll 2
    for (int i = 0; i < kVectors; i += 2) {
      const int64_t j = k + i * S::kWidth;
      const I ahead = S::set1(static_cast<int32_t>(static_cast<uint32_t>(i * S::kWidth) * kWeylStep));
      const typename S::TwoI word{S::add(words.a, ahead), S::add(words.b, ahead)};
      const F m[2] = {S::load(x.first + j), S::load(x.first + j + S::kWidth)};
      const F root[2] = {S::load(x.root + j), S::load(x.root + j + S::kWidth)};
      const auto p = param_.load2(x.at + j);
      param_.store2(x.at + j, {descended(p.a, m[0], root[0]), descended(p.b, m[1], root[1])}, word);
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        const F dither = S::to_float(S::template shift_right<8>(h == 0 ? word.a : word.b));
        first[i + h] = signed_code<S>(m[h], x.first_inverse, dither);
        const F code = S::mul(root[h], x.root_inverse);
        exact[i + h] = S::bits(code), second[i + h] = S::truncate(add_dither<S>(code, dither));
      }
    }
    S::template store4_codes<T>(first_codes_ + x.at + k, first);
    S::template store4_codes<T>(second_codes_ + x.at + k, second, exact);
  }
  inline __attribute__((always_inline)) void finish(Block& x, int64_t k) const {
    for (; k + kGroup <= x.n; k += kGroup) finish_group(x, k);
    for (; k < x.n; k += S::kWidth) {
      const int rest = static_cast<int>(std::min<int64_t>(S::kWidth, x.n - k));
      const F m = S::load(x.first + k), root = S::load(x.root + k);
      const I word = x.dither.next();
      param_.store(x.at + k, descended(param_.load(x.at + k, rest), m, root), word, rest);
      const F dither = S::to_float(S::template shift_right<8>(word));
      store_code(first_codes_ + x.at + k, encode_signed<S>(m, x.first_inverse, dither), rest);
      store_code(second_codes_ + x.at + k, encode_unsigned<S>(root, x.root_inverse, dither), rest);
    }
    if (!x.first_live) std::memset(first_codes_ + x.at, 0, x.n);
    if (!x.root_live) std::memset(second_codes_ + x.at, 0, x.n);
  }
  static void store_code(int8_t* to, I code, int n) { S::store_i8_tail(to, code, n); }
  static void store_code(uint8_t* to, I code, int n) {
    uint8_t padded[S::kWidth];
    S::store_u8(padded, S::min(code, S::set1(255)));
    std::memcpy(to, padded, n);
  }

  AdamParam<S, kind> param_;
  int8_t* first_codes_;
  uint8_t* second_codes_;
  F rest1_, beta2_, rest2_, root_, eps_, length_, decay_;
};

template <class S>
void update_adam_codes(const OptimizerRule& rule, const OptimizerTensor& tensor, int64_t begin, int64_t end,
                       float* scratch, const Rule<S>& r) {
  const auto run = [&]<ParamKind kind>(std::integral_constant<ParamKind, kind>) {
    AdamCodes<S, kind>(rule, tensor, r).run(rule, tensor, begin, end, scratch);
  };
  using enum ParamKind;
  if (rule.param_dtype == DType::f32) return run(std::integral_constant<ParamKind, f32>{});
  switch (rule.rounding) {
    case Rounding::stochastic:
      return run(std::integral_constant<ParamKind, bf16_stochastic>{});
    case Rounding::split_master:
      return run(std::integral_constant<ParamKind, split_master>{});
    default:
      return run(std::integral_constant<ParamKind, bf16_nearest>{});
  }
}

}  // namespace
}  // namespace pykernels::cpu
