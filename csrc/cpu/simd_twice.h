// Two vectors of a simd_*.h at a time, in the order that is cheapest for elements of type T (S::load2): as a struct
// with the names of those, so that a kernel written for one vector runs on two. Floats beside the elements (a weight, a
// sum along columns) lie in the same order in memory of their own, padded to whole vectors: put_in_order,
// take_in_order.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "float_types.h"

namespace pykernels::cpu {
namespace {

template <class S, class T>
struct Twice {
  using One = S;
  using F = typename S::Two;
  static constexpr int kWidth = 2 * S::kWidth;

  static F load(const T* p) { return S::load2(p); }
  static F load_tail(const T* p, int n) {
    T padded[kWidth] = {};
    std::memcpy(padded, p, n * sizeof(T));
    return load(padded);
  }
  static void store(T* p, F v) { S::store2(p, v); }
  static void stream(T* p, F v) { S::stream2(p, v); }
  static void store_tail(T* p, F v, int n) {
    T padded[kWidth];
    store(padded, v);
    std::memcpy(p, padded, n * sizeof(T));
  }
  // 1 in the lanes of the first n elements, 0 in the others.
  static F first_ones(int n) {
    T ones[kWidth] = {};
    for (int j = 0; j < n; ++j) ones[j] = from_float<T>(1.0f);
    return load(ones);
  }
  static F load_ordered(const float* p) { return {S::load(p), S::load(p + S::kWidth)}; }
  static void store_ordered(float* p, F v) { S::store(p, v.a), S::store(p + S::kWidth, v.b); }

  static F in_order(F v) { return S::template in_order_of<T>(v); }
  static F from_order(F v) { return S::template from_order_of<T>(v); }

  static F set1(float value) { return {S::set1(value), S::set1(value)}; }
  static F mul(F a, F b) { return {S::mul(a.a, b.a), S::mul(a.b, b.b)}; }
  static F add(F a, F b) { return {S::add(a.a, b.a), S::add(a.b, b.b)}; }
  static F sub(F a, F b) { return {S::sub(a.a, b.a), S::sub(a.b, b.b)}; }
  static F fma(F a, F b, F c) { return {S::fma(a.a, b.a, c.a), S::fma(a.b, b.b, c.b)}; }
  static F mul_live(F v, F factor) { return {S::mul_live(v.a, factor.a), S::mul_live(v.b, factor.b)}; }
  static F swap_pairs(F v) { return S::template swap_pairs2<T>(v); }
  static float reduce_add(F v) { return S::reduce_add(S::add(v.a, v.b)); }
};

inline float plain_nan(float v) { return v == v ? v : __builtin_nanf(""); }

// n floats into the order of V, a Twice, and zeros up to whole vectors. NaN becomes the one that store2 takes.
template <class V>
void put_in_order(const float* from, int64_t n, float* to) {
  constexpr int W = V::kWidth;
  for (int64_t k = 0; k < n; k += W) {
    float natural[W] = {};
    const int count = static_cast<int>(std::min<int64_t>(W, n - k));
    for (int j = 0; j < count; ++j) natural[j] = plain_nan(from[k + j]);
    V::store_ordered(to + k, V::in_order(V::load_ordered(natural)));
  }
}

// The reverse, without the padding.
template <class V>
void take_in_order(const float* from, int64_t n, float* to) {
  constexpr int W = V::kWidth;
  for (int64_t k = 0; k < n; k += W) {
    float natural[W];
    V::store_ordered(natural, V::from_order(V::load_ordered(from + k)));
    std::memcpy(to + k, natural, std::min<int64_t>(W, n - k) * sizeof(float));
  }
}

}  // namespace
}  // namespace pykernels::cpu
