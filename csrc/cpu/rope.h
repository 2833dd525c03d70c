// The body of rope, compiled once for each instruction set. Products and sums round one by one, so that every backend
// gives the same bits.
#pragma once

#include "float_types.h"
#include "rope_kernels.h"
#include "simd_twice.h"
#include "stream_row.h"

namespace pykernels::cpu {
namespace {

template <class T>
void rope_table_row(const T* cos, const T* sin, const Rope& args, float* c, float* s) {
  for (int64_t i = 0; i < args.pairs; ++i) {
    const float ci = to_float(cos[i]), si = args.inverse ? -to_float(sin[i]) : to_float(sin[i]);
    if (args.interleaved) {
      c[2 * i] = ci, c[2 * i + 1] = ci;
      s[2 * i] = -si, s[2 * i + 1] = si;
    } else {
      c[i] = ci;
      s[i] = si;
    }
  }
}

// Cosines and signed sines of positions [row, row + count), rope_line(args.pairs) floats apart, in the order of V.
template <class V, class T>
void rope_table(const Rope& args, int64_t row, int64_t count, float* c, float* s, float* natural) {
  const int64_t line = rope_line(args.pairs), n = args.interleaved ? 2 * args.pairs : args.pairs;
  for (int64_t r = row; r < row + count; ++r, c += line, s += line) {
    const int64_t at =
        args.position_ids == nullptr ? r % args.S : args.position_ids[r / args.S * args.ids_stride + r % args.S];
    rope_table_row(static_cast<const T*>(args.cos) + at * args.cos_stride,
                   static_cast<const T*>(args.sin) + at * args.sin_stride, args, natural, natural + line);
    put_in_order<V>(natural, n, c);
    put_in_order<V>(natural + line, n, s);
  }
}

template <class V, class T, class Load, class Store>
inline void rotate_half(const T* x, T* out, int64_t pairs, const float* c, const float* s, Load load, Store store) {
  const auto first = load(x), second = load(x + pairs), cos = V::load_ordered(c), sin = V::load_ordered(s);
  store(out, V::sub(V::mul(first, cos), V::mul(second, sin)));
  store(out + pairs, V::add(V::mul(second, cos), V::mul(first, sin)));
}

template <class V, class T, class Load, class Store>
inline void rotate_interleaved(const T* x, T* out, const float* c, const float* s, Load load, Store store) {
  const auto v = load(x);
  store(out, V::add(V::mul(v, V::load_ordered(c)), V::mul(V::swap_pairs(v), V::load_ordered(s))));
}

template <class V, class T>
void rotate_head(const Rope& args, const T* x, T* out, const float* c, const float* s) {
  constexpr int W = V::kWidth;
  const auto load = [](const T* p) { return V::load(p); };
  const auto store = [](T* p, typename V::F v) { V::store(p, v); };
  const int64_t n = args.interleaved ? 2 * args.pairs : args.pairs;
  int64_t i = 0;
  if (args.interleaved) {
    for (; i + W <= n; i += W) rotate_interleaved<V>(x + i, out + i, c + i, s + i, load, store);
  } else {
    for (; i + W <= n; i += W) rotate_half<V>(x + i, out + i, n, c + i, s + i, load, store);
  }
  if (i < n) {
    const int rest = static_cast<int>(n - i);
    const auto load_rest = [rest](const T* p) { return V::load_tail(p, rest); };
    const auto store_rest = [rest](T* p, typename V::F v) { V::store_tail(p, v, rest); };
    if (args.interleaved) {
      rotate_interleaved<V>(x + i, out + i, c + i, s + i, load_rest, store_rest);
    } else {
      rotate_half<V>(x + i, out + i, n, c + i, s + i, load_rest, store_rest);
    }
  }
  const int64_t turned = 2 * args.pairs;
  if (turned < args.D) std::memcpy(out + turned, x + turned, (args.D - turned) * sizeof(T));
}

// Walks the input in the order in which it lies: heads inside positions, or positions inside heads.
template <class S, class T>
void rotate_tile(const Rope& args, const RopeTensor& t, int64_t row, int64_t count, const float* c, const float* s,
                 T* buffer) {
  if (t.x == nullptr) return;
  const int64_t line = rope_line(args.pairs);
  const auto one = [&](int64_t r, int64_t h) {
    const int64_t at = (row + r) / args.S * t.batch_stride + (row + r) % args.S * t.seq_stride + h * t.head_stride;
    T* out = static_cast<T*>(t.out) + ((row + r) * t.heads + h) * args.D;
    rotate_head<Twice<S, T>>(args, static_cast<const T*>(t.x) + at, args.stream ? buffer : out, c + r * line,
                             s + r * line);
    if (args.stream) stream_row<S>(buffer, out, args.D * static_cast<int64_t>(sizeof(T)));
  };
  if (t.head_stride <= t.seq_stride) {
    for (int64_t r = 0; r < count; ++r)
      for (int64_t h = 0; h < t.heads; ++h) one(r, h);
  } else {
    for (int64_t h = 0; h < t.heads; ++h)
      for (int64_t r = 0; r < count; ++r) one(r, h);
  }
}

template <class S, class T>
void rope_rows(const Rope& args, int64_t begin, int64_t end, float* scratch) {
  using V = Twice<S, T>;
  const int64_t line = rope_line(args.pairs);
  float *const c = scratch, *const s = c + kRopeTile * line, *const natural = s + kRopeTile * line;
  T* const buffer = reinterpret_cast<T*>(natural + 2 * line);
  for (int64_t row = begin; row < end; row += kRopeTile) {
    const int64_t count = end - row < kRopeTile ? end - row : kRopeTile;
    if (args.table_dtype == DType::f32) {
      rope_table<V, float>(args, row, count, c, s, natural);
    } else if (args.table_dtype == DType::bf16) {
      rope_table<V, bf16>(args, row, count, c, s, natural);
    } else {
      rope_table<V, f16>(args, row, count, c, s, natural);
    }
    rotate_tile<S, T>(args, args.q, row, count, c, s, buffer);
    rotate_tile<S, T>(args, args.k, row, count, c, s, buffer);
  }
  if (args.stream) S::fence();
}

template <class S>
constexpr RopeKernels rope_kernels() {
  return {{rope_rows<S, float>, rope_rows<S, f16>, rope_rows<S, bf16>}};
}

}  // namespace
}  // namespace pykernels::cpu
