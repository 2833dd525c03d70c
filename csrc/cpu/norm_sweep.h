// How a norm walks along a row: whole vectors, the elements that are left, and sums that stay exact on long rows.
// S is one of the structs of simd_*.h.
#pragma once

#include <algorithm>
#include <cstdint>

namespace pykernels::cpu {
namespace {

// A vector's worth of elements, all of them or the first n: then the other lanes load as 0 and are not stored.
template <class S>
struct AllLanes {
  template <class T>
  typename S::F load(const T* p) const {
    return S::load(p);
  }
  template <class T>
  void store(T* p, typename S::F v) const {
    S::store(p, v);
  }
  typename S::F only(typename S::F v) const { return v; }
};

template <class S>
struct SomeLanes {
  int n;
  template <class T>
  typename S::F load(const T* p) const {
    return S::load_tail(p, n);
  }
  template <class T>
  void store(T* p, typename S::F v) const {
    S::store_tail(p, v, n);
  }
  // v, with the lanes that hold no element set to 0.
  typename S::F only(typename S::F v) const {
    float lanes[S::kWidth];
    S::store(lanes, v);
    return S::load_tail(lanes, n);
  }
};

// body(lanes, k, j) for each vector of [begin, end); j < max(kVectors, 2) names an accumulator, so that
// sums run side by side.
template <class S, int kVectors = 4, class Body>
inline void sweep(int64_t begin, int64_t end, Body body) {
  constexpr int W = S::kWidth;
  int64_t k = begin;
  for (; kVectors > 1 && k + kVectors * W <= end; k += kVectors * W) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) body(AllLanes<S>{}, k + j * W, j);
  }
  for (; k + W <= end; k += W) body(AllLanes<S>{}, k, 0);
  if (k < end) body(SomeLanes<S>{static_cast<int>(end - k)}, k, 1);
}

// A float32 sum of so many terms loses less than its rounding; longer ones go on in double.
constexpr int64_t kSumTerms = 8192;

// The sum over a row of term(lanes, k), as body above.
template <class S, class Term>
inline double sum_row(int64_t n, Term term) {
  double total = 0.0;
  for (int64_t begin = 0; begin < n; begin += kSumTerms) {
    typename S::F acc[4] = {S::set1(0.0f), S::set1(0.0f), S::set1(0.0f), S::set1(0.0f)};
    sweep<S>(begin, std::min(n, begin + kSumTerms),
             [&](auto lanes, int64_t k, int j) { acc[j] = term(lanes, k, acc[j]); });
    total += static_cast<double>(S::reduce_add(S::add(S::add(acc[0], acc[1]), S::add(acc[2], acc[3]))));
  }
  return total;
}

}  // namespace
}  // namespace pykernels::cpu
