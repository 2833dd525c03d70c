// rms_norm and layer_norm: y = (h - mean) * rstd * weight + bias over rows of h = x + residual. Without `centre` the
// mean is 0. Statistics are float32; weight holds its offset already.
#pragma once

#include "../launchers.h"

namespace pykernels {

struct NormForward {
  const void* x = nullptr;
  const void* residual = nullptr;  // null: h is x
  DType dtype = DType::f32;        // of x, residual, h and y
  int64_t x_stride = 0;            // between rows; 1 within a row
  int64_t residual_stride = 0;
  int64_t K = 0;
  const float* weight = nullptr;  // [K]; null: 1
  const float* bias = nullptr;    // [K]; null: 0
  double eps = 0.0;
  bool centre = false;
  void* h = nullptr;       // [M, K]; null: not kept
  void* y = nullptr;       // [M, K]; not written where there is a scale
  int8_t* q = nullptr;     // [M, K]
  float* scale = nullptr;  // [M]
  float* rstd = nullptr;   // [M]; null: not kept
  float* mean = nullptr;   // [M]; null: not kept
  bool stream = false;     // write h and y past the caches; rows then are whole lines of 64 bytes
};

// grad_x = rstd * (g - mean(g) - x_hat * mean(g * x_hat)) + grad_h, where g = grad * weight; mean(g) only with a mean.
struct NormBackward {
  const void* grad = nullptr;
  const void* grad_h = nullptr;  // null: 0
  const void* h = nullptr;
  DType dtype = DType::f32;  // of grad, grad_h, h and grad_x
  int64_t grad_stride = 0;
  int64_t grad_h_stride = 0;
  int64_t h_stride = 0;
  int64_t M = 0;
  int64_t K = 0;
  const float* weight = nullptr;  // [K]; null: 1
  const float* rstd = nullptr;    // [M]
  const float* mean = nullptr;    // [M]; null: rms_norm
  void* grad_x = nullptr;         // [M, K]
  int64_t chunk_rows = 1;
  float* weight_sums = nullptr;  // [chunks, K], of grad * x_hat; null: not wanted
  float* bias_sums = nullptr;    // [chunks, K], of grad; null: not wanted
  bool stream = false;           // write grad_x past the caches; rows then are whole lines of 64 bytes
};

namespace cpu {
void norm_forward(const NormForward& args, int64_t begin, int64_t end);  // rows [begin, end)

// Rows that share a line of weight_sums: a function of M alone, so that no sum depends on the number of threads.
int64_t norm_chunk_rows(int64_t M);
void norm_backward(const NormBackward& args, int64_t begin, int64_t end);  // chunks [begin, end)

// out[k] = sum over chunks of sums[chunk, k], for columns [begin, end).
void norm_column_sums(const float* sums, int64_t chunks, int64_t K, DType out_dtype, void* out, int64_t begin,
                      int64_t end);
}  // namespace cpu

}  // namespace pykernels
