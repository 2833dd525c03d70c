// optimizer_update_ and optimizer_norms: one step of an optimizer. A tensor is rows of columns; each row is cut into
// blocks, with a scale each where the state is held in codes. pykernels/ops/_optimizer_reference.py says what is
// computed, and in which order.
#pragma once

#include "../launchers.h"

namespace pykernels {

// The numbers are part of the operator's schema.
enum class Algorithm : int { adam = 0, lamb = 1, lion = 2, sgd = 3, adagrad = 4, rmsprop = 5 };
enum class Rounding : int { nearest = 0, stochastic = 1, kahan = 2, split_master = 3 };
enum class StateKind : int { f32 = 0, bf16 = 1, codes = 2, f64 = 3 };

inline constexpr int kMaximize = 1, kDecoupled = 2, kAmsgrad = 4, kNesterov = 8, kMomentum = 16, kCentered = 32,
                     kUncorrected = 64;
inline constexpr int kMostSlots = 3;

// What all tensors of a call share.
struct OptimizerRule {
  Algorithm algorithm = Algorithm::adam;
  int flags = 0;
  double beta1 = 0.0;
  double beta2 = 0.0;
  double eps = 0.0;
  double weight_decay = 0.0;
  double grad_scale = 1.0;
  DType param_dtype = DType::f32;
  DType grad_dtype = DType::f32;
  StateKind state = StateKind::f32;
  Rounding rounding = Rounding::nearest;
  int slots = 0;
  bool slot_signed[kMostSlots] = {};
  int64_t block = 1;  // columns of one; the block_size of codes
  uint64_t seed = 0;
};

struct OptimizerTensor {
  void* param = nullptr;
  const void* grad = nullptr;
  void* state[kMostSlots] = {};
  float* scale[kMostSlots] = {};
  void* extra = nullptr;  // the compensation of kahan, the int16 of split_master
  int64_t rows = 0;
  int64_t columns = 0;
  int64_t start = 0;       // the index of the first element in the tensor that this one is a shard of,
  int64_t row_stride = 0;  // and how much further a row begins
  uint32_t stream = 0;
  uint32_t step = 0;       // the one being made, from 1
  double root = 1.0;       // factor of the root of Adam's second moment
  double direction = 1.0;  // factor of LAMB's direction before weight decay
  double length = 0.0;     // what the direction is multiplied by
  double decay = 1.0;      // what the parameter is multiplied by, where decoupled

  int64_t blocks_of_row(int64_t block) const { return (columns + block - 1) / block; }
  int64_t blocks(int64_t block) const { return rows * blocks_of_row(block); }
};

namespace cpu {
// Columns that a block should have where there are no codes.
inline constexpr int64_t kPlainBlock = 4096;

// Blocks [begin, end) of a tensor.
void optimizer_update(const OptimizerRule& rule, const OptimizerTensor& tensor, int64_t begin, int64_t end);
// Adds the squares of those blocks' parameters and directions, before the factor of the latter, to sums.
void optimizer_norms(const OptimizerRule& rule, const OptimizerTensor& tensor, int64_t begin, int64_t end,
                     double (&sums)[2]);

// squared_norms and scale_tensors_ of n contiguous elements.
double squared_norm(const void* x, DType dtype, int64_t n);
void scale_tensor(void* x, DType dtype, int64_t n, double factor);
}  // namespace cpu

}  // namespace pykernels
