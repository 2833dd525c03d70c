// The loops of gated_activation, compiled once for each instruction set, activation and dtype.
#pragma once

#include "gated_activation_functions.h"
#include "gated_activation_kernels.h"
#include "quantize_span.h"

namespace pykernels::cpu {
namespace {

// body(row, first column, columns) for the parts of rows that make up elements [begin, end).
template <class Body>
void for_parts_of_rows(int64_t K, int64_t begin, int64_t end, Body body) {
  for (int64_t m = begin / K, k = begin % K; begin < end; ++m, k = 0) {
    const int64_t n = std::min(K - k, end - begin);
    body(m, k, n);
    begin += n;
  }
}

// step(offset) for every 2 * kWidth elements of n, then rest(offset, count).
template <class S, class Step, class Rest>
inline void for_twos(int64_t n, Step step, Rest rest) {
  constexpr int W = 2 * S::kWidth;
  int64_t k = 0;
  for (; k + W <= n; k += W) step(k);
  if (k < n) rest(k, static_cast<int>(n - k));
}

template <class S, GatedActivation A, class T>
inline typename S::Two product(const T* gate, const T* up) {
  const typename S::Two x = S::load2(gate);
  const auto a = activation<S, A, T>(x.a).value, b = activation<S, A, T>(x.b).value;
  if constexpr (A == GatedActivation::relu2) return {a, b};
  const typename S::Two y = S::load2(up);
  return {S::mul(a, y.a), S::mul(b, y.b)};
}

// Elements before p reaches a line of 64 bytes, of n.
template <class T>
inline int64_t before_line(const T* p, int64_t n) {
  const int64_t bytes = static_cast<int64_t>(-reinterpret_cast<uintptr_t>(p) % 64);
  return std::min(n, bytes / static_cast<int64_t>(sizeof(T)));
}

template <class S, bool kStream, class T>
inline void put2(T* p, typename S::Two v) {
  kStream ? S::stream2(p, v) : S::store2(p, v);
}

template <class S, GatedActivation A, bool kStream = false, class T>
void forward_part(const T* gate, const T* up, T* out, int64_t n) {
  for_twos<S>(
      n, [&](int64_t k) { put2<S, kStream>(out + k, product<S, A>(gate + k, up + k)); },
      [&](int64_t k, int count) {
        T x[2 * S::kWidth] = {}, y[2 * S::kWidth] = {}, z[2 * S::kWidth];
        std::memcpy(x, gate + k, count * sizeof(T));
        if constexpr (A != GatedActivation::relu2) std::memcpy(y, up + k, count * sizeof(T));
        S::store2(z, product<S, A>(x, y));
        std::memcpy(out + k, z, count * sizeof(T));
      });
}

template <class S, GatedActivation A, bool kStream, class T>
inline void gradients(const T* grad, const T* gate, const T* up, T* grad_gate, T* grad_up) {
  const typename S::Two g = S::load2(grad), x = S::load2(gate);
  const auto a = activation<S, A, T>(x.a), b = activation<S, A, T>(x.b);
  if constexpr (A == GatedActivation::relu2) {
    put2<S, kStream>(grad_gate, {S::mul(g.a, a.slope), S::mul(g.b, b.slope)});
  } else {
    const typename S::Two y = S::load2(up);
    put2<S, kStream>(grad_gate, {S::mul(S::mul(g.a, y.a), a.slope), S::mul(S::mul(g.b, y.b), b.slope)});
    put2<S, kStream>(grad_up, {S::mul(g.a, a.value), S::mul(g.b, b.value)});
  }
}

template <class S, GatedActivation A, bool kStream, class T>
void backward_part(const T* grad, const T* gate, const T* up, T* grad_gate, T* grad_up, int64_t n) {
  for_twos<S>(
      n, [&](int64_t k) { gradients<S, A, kStream>(grad + k, gate + k, up + k, grad_gate + k, grad_up + k); },
      [&](int64_t k, int count) {
        T in[3][2 * S::kWidth] = {}, out[2][2 * S::kWidth];
        const size_t bytes = count * sizeof(T);
        std::memcpy(in[0], grad + k, bytes);
        std::memcpy(in[1], gate + k, bytes);
        if constexpr (A != GatedActivation::relu2) std::memcpy(in[2], up + k, bytes);
        gradients<S, A, false>(in[0], in[1], in[2], out[0], out[1]);
        std::memcpy(grad_gate + k, out[0], bytes);
        if constexpr (A != GatedActivation::relu2) std::memcpy(grad_up + k, out[1], bytes);
      });
}

template <class S, GatedActivation A, class T>
void gated_forward(const GatedForward& args, int64_t begin, int64_t end) {
  const T *gate = static_cast<const T*>(args.gate), *up = static_cast<const T*>(args.up);
  for_parts_of_rows(args.K, begin, end, [&](int64_t m, int64_t k, int64_t n) {
    const T *const g = gate + m * args.gate_stride + k, *const u = up + m * args.up_stride + k;
    T* const out = static_cast<T*>(args.out) + m * args.K + k;
    const int64_t head = args.stream ? before_line(out, n) : n;
    forward_part<S, A, false>(g, u, out, head);
    forward_part<S, A, true>(g + head, u + head, out + head, n - head);
  });
  if (args.stream) S::fence();
}

template <class S, GatedActivation A, class T>
void gated_backward(const GatedBackward& args, int64_t begin, int64_t end) {
  const T *gate = static_cast<const T*>(args.gate), *up = static_cast<const T*>(args.up);
  T *grad_gate = static_cast<T*>(args.grad_gate), *grad_up = static_cast<T*>(args.grad_up);
  for_parts_of_rows(args.K, begin, end, [&](int64_t m, int64_t k, int64_t n) {
    const T* const d = static_cast<const T*>(args.grad) + m * args.grad_stride + k;
    const T *const g = gate + m * args.gate_stride + k, *const u = up + m * args.up_stride + k;
    T *const dg = grad_gate + m * args.grad_gate_stride + k, *const du = grad_up + m * args.grad_up_stride + k;
    const int64_t head = args.stream ? before_line(dg, n) : n;
    backward_part<S, A, false>(d, g, u, dg, du, head);
    backward_part<S, A, true>(d + head, g + head, u + head, dg + head, du + head, n - head);
  });
  if (args.stream) S::fence();
}

template <class S, GatedActivation A, class T>
void gated_quantized(const GatedQuantized& args, void* row, int64_t begin, int64_t end) {
  const GatedForward& f = args.forward;
  const T *gate = static_cast<const T*>(f.gate), *up = static_cast<const T*>(f.up);
  T* product = static_cast<T*>(row);
  for (int64_t m = begin; m < end; ++m) {
    forward_part<S, A>(gate + m * f.gate_stride, up + m * f.up_stride, product, f.K);
    const Scale s = scale_of_absmax(absmax_bits<S>(product, f.K));
    args.scale[m] = s.scale;
    if (s.inv == 0.0f) {
      std::memset(args.q + m * f.K, 0, f.K);
    } else {
      quantize_span<S, false>(product, f.K, s.inv, args.q + m * f.K);
    }
  }
}

template <class S, GatedActivation A, class T>
constexpr GatedKernels::Entry gated_entry() {
  return {gated_forward<S, A, T>, gated_backward<S, A, T>, gated_quantized<S, A, T>};
}

template <class S>
constexpr GatedKernels gated_kernels() {
  using A = GatedActivation;
#define PYKERNELS_GATED(activation)                                                                            \
  {                                                                                                            \
    gated_entry<S, activation, float>(), gated_entry<S, activation, f16>(), gated_entry<S, activation, bf16>() \
  }
  return {{PYKERNELS_GATED(A::relu), PYKERNELS_GATED(A::gelu), PYKERNELS_GATED(A::gelu_tanh), PYKERNELS_GATED(A::silu),
           PYKERNELS_GATED(A::relu2)}};
#undef PYKERNELS_GATED
}

}  // namespace
}  // namespace pykernels::cpu
