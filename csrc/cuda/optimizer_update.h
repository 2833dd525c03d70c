// optimizer_update_ on CUDA: what a launch is given. Everything travels as kernel arguments, at most 4 KiB a launch, so
// that no table is copied and a captured graph holds all it needs.
#pragma once

#include <cstdint>

namespace pykernels::cuda {

// The numbers of pykernels/ops/_optimizer_reference.py.
enum class Rule : int32_t { adam, lamb, lion, sgd, adagrad, rmsprop };
enum RuleFlag : int32_t {
  kMaximize = 1,
  kDecoupled = 2,
  kAmsgrad = 4,
  kNesterov = 8,
  kMomentum = 16,
  kCentered = 32,
  kUncorrected = 64
};
enum class Rounding : int32_t { nearest, stochastic, kahan, split_master };

// What is stored: in parameters, gradients, states (i8 and u8 are codes) and extras.
enum class Kind : int32_t { none, f32, f16, bf16, f64, i8, u8, i16 };

constexpr int kSlots = 3;
constexpr int kTensorsPerLaunch = 23;
constexpr int kCoefficients = 6;  // float64 a tensor

// One tensor: `columns` of a row are cut into blocks; start and row_stride place it in the tensor it is a shard of.
struct UpdatedTensor {
  void* param = nullptr;
  const void* grad = nullptr;
  void* extra = nullptr;
  float* step = nullptr;  // on the device; null where host_step is the step before this one
  void* state[kSlots] = {};
  float* scale[kSlots] = {};
  int64_t rows = 0;
  int64_t columns = 0;
  int64_t blocks = 0;  // these two are the launcher's to fill in
  int64_t blocks_per_row = 1;
  int64_t start = 0;
  int64_t row_stride = 0;
  float host_step = 0.0f;
  uint32_t stream = 0;
  int32_t index = 0;   // in ratio and in coefficients
  int32_t vector = 0;  // every address and row lies on 16 bytes
};

struct OptimizerUpdate {
  UpdatedTensor tensor[kTensorsPerLaunch];
  uint32_t first_block[kTensorsPerLaunch] = {};  // thread block of the launch
  int32_t count = 0;
  Rule rule = Rule::adam;
  int32_t flags = 0;
  Rounding rounding = Rounding::nearest;
  Kind param_kind = Kind::none;
  Kind grad_kind = Kind::none;
  Kind extra_kind = Kind::none;
  Kind state_kind[kSlots] = {};
  int32_t block_size = 0;  // of codes; the launcher's to fill in without
  int32_t decay = 0;       // weight_decay is not 0
  double beta1 = 0.0;
  double beta2 = 0.0;
  double eps = 0.0;
  double weight_decay = 0.0;
  uint64_t seed = 0;
  // Scalars on the device, of kind f32 or f64; null where there is none. Without lr_device `lr` is it.
  const void* lr_device = nullptr;
  const void* grad_scale = nullptr;
  const void* found_inf = nullptr;
  Kind lr_kind = Kind::none;
  Kind grad_scale_kind = Kind::none;
  Kind found_inf_kind = Kind::none;
  double lr = 0.0;
  const float* ratio = nullptr;
  double* coefficients = nullptr;  // [tensors, kCoefficients]
};
static_assert(sizeof(OptimizerUpdate) <= 4096, "kernel arguments are limited to 4 KiB");

// Increases the steps, then updates the tensors; found_inf stops both on the device.
const char* optimizer_update(OptimizerUpdate& args, void* stream);

// Where the GPU sees pinned host memory; CUDA's reason if it does not.
const char* device_address(const void* host, void** device);

}  // namespace pykernels::cuda
