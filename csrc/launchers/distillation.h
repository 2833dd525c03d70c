// distillation_rows: the loss of each row of a student's logits against a teacher's, and the student's gradient.
#pragma once

#include "../launchers.h"

namespace pykernels {

// The numbers are part of the operator schemas (pykernels/ops/distillation.py holds the names).
enum class Divergence : int { kl = 0, reverse_kl = 1, jsd = 2, mse = 3 };

// loss[m] = (1 - hard_weight) * temperature^2 * D(p, q) + hard_weight * cross_entropy(student, target), with p and q
// the softmax of teacher / temperature and student / temperature. Rows whose target is ignore_index are 0.
struct DistillationRows {
  const void* student = nullptr;
  DType student_dtype = DType::f32;
  int64_t student_stride = 0;  // between rows; 1 within a row
  const void* teacher = nullptr;
  DType teacher_dtype = DType::f32;
  int64_t teacher_stride = 0;
  int64_t V = 0;
  const int64_t* target = nullptr;  // [M], in [0, V) or ignore_index; null: no labels
  int64_t ignore_index = 0;
  Divergence divergence = Divergence::kl;
  float beta = 0.0f;
  float temperature = 1.0f;
  float hard_weight = 0.0f;
  float* loss = nullptr;         // [M]; null: not wanted
  const float* scale = nullptr;  // [M], what the gradient is multiplied by
  void* grad = nullptr;          // of the student's dtype; may be student itself; null: not wanted
  int64_t grad_stride = 0;
};

namespace cpu {
void distillation_rows(const DistillationRows& args, int64_t begin, int64_t end);  // rows [begin, end)
}

}  // namespace pykernels
