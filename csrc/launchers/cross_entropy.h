// cross_entropy: losses and statistics of rows of logits, their gradient, and the same for a tile of the classes.
#pragma once

#include "../launchers.h"

namespace pykernels {

// What all four share. z = softcap * tanh(logits / softcap), or the logits themselves when softcap is 0. Column c of
// logits is class first_class + c of num_classes. Rows whose target is ignore_index count for nothing.
struct CrossEntropy {
  const void* logits = nullptr;
  DType dtype = DType::f32;
  int64_t stride = 0;  // between rows; 1 within a row
  int64_t columns = 0;
  const int64_t* target = nullptr;
  int64_t ignore_index = -100;
  const float* weight = nullptr;  // [num_classes]; null: 1
  float weight_sum = 0.0f;        // of all classes
  float label_smoothing = 0.0f;
  float z_loss = 0.0f;
  float softcap = 0.0f;
  int64_t first_class = 0;
  int64_t num_classes = 0;
};

// Of each row, 0 where ignored. correct: no logit is larger than the target's.
struct CrossEntropyLosses {
  float* loss = nullptr;
  float* lse = nullptr;
  bool* correct = nullptr;
};

// [rows, 4]: maximum of z, sum of exp(z - maximum), z of the target, sum of weight * z.
inline constexpr int64_t kCrossEntropyState = 4;

struct CrossEntropyBackward {
  const float* grad = nullptr;
  int64_t grad_stride = 1;
  const float* grad_lse = nullptr;  // null: 0
  const float* lse = nullptr;
  void* out = nullptr;  // of the dtype of logits; may be logits itself
  int64_t out_stride = 0;
};

namespace cpu {
// Rows [begin, end).
void cross_entropy(const CrossEntropy& args, const CrossEntropyLosses& losses, int64_t begin, int64_t end);
void cross_entropy_update(const CrossEntropy& args, float* state, int64_t begin, int64_t end);
void cross_entropy_backward(const CrossEntropy& args, const CrossEntropyBackward& backward, int64_t begin, int64_t end);
}  // namespace cpu

}  // namespace pykernels
