// How a norm walks along a row: whole vectors, the elements that are left, and sums that stay exact on long rows.
// V is a Twice of simd_twice.h.
#pragma once

#include <algorithm>
#include <cstdint>

#include "simd_twice.h"

namespace pykernels::cpu {
namespace {

// A vector's worth of elements, all of them or the first n: then the other lanes load as 0 and are not stored.
template <class V>
struct AllLanes {
  template <class T>
  typename V::F load(const T* p) const {
    return V::load(p);
  }
  template <bool kStream, class T>
  void store(T* p, typename V::F v) const {
    kStream ? V::stream(p, v) : V::store(p, v);
  }
  typename V::F only(typename V::F v) const { return v; }
};

template <class V>
struct SomeLanes {
  int n;
  template <class T>
  typename V::F load(const T* p) const {
    return V::load_tail(p, n);
  }
  template <bool kStream, class T>
  void store(T* p, typename V::F v) const {
    V::store_tail(p, v, n);
  }
  // v, with the lanes that hold no element set to 0.
  typename V::F only(typename V::F v) const { return V::mul_live(v, V::first_ones(n)); }
};

// body(lanes, k, j) for each vector of [begin, end); j < max(kVectors, 2) names an accumulator, so that
// sums run side by side.
template <class V, int kVectors, class Body>
inline void sweep(int64_t begin, int64_t end, Body body) {
  constexpr int W = V::kWidth;
  int64_t k = begin;
  for (; kVectors > 1 && k + kVectors * W <= end; k += kVectors * W) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) body(AllLanes<V>{}, k + j * W, j);
  }
  for (; k + W <= end; k += W) body(AllLanes<V>{}, k, 0);
  if (k < end) body(SomeLanes<V>{static_cast<int>(end - k)}, k, 1);
}

// A float32 sum of so many terms loses less than its rounding; longer ones go on in double.
constexpr int64_t kSumTerms = 8192;

// The sum over a row of term(lanes, k), as body above.
template <class V, class Term>
inline double sum_row(int64_t n, Term term) {
  double total = 0.0;
  for (int64_t begin = 0; begin < n; begin += kSumTerms) {
    typename V::F acc[2] = {V::set1(0.0f), V::set1(0.0f)};
    sweep<V, 2>(begin, std::min(n, begin + kSumTerms),
                [&](auto lanes, int64_t k, int j) { acc[j] = term(lanes, k, acc[j]); });
    total += static_cast<double>(V::reduce_add(V::add(acc[0], acc[1])));
  }
  return total;
}

// One row of memory fetched into the cache while another is worked on: the bytes of [p + k, p + k + n).
template <class T>
inline void fetch(const T* p, int64_t k, int n) {
  for (int64_t byte = 0; byte < n * static_cast<int64_t>(sizeof(T)); byte += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(p + k) + byte, 0, 2);
}

}  // namespace
}  // namespace pykernels::cpu
