// The checks of the optimizers' lists of tensors, in the words of pykernels/ops/optimizer_update.py. A list may hold
// thousands of small tensors, so that what is asked of each is one C call, and text is made only of what is wrong.
#pragma once

#include <cmath>
#include <optional>
#include <string>
#include <vector>

#include "../../launchers/optimizer.h"
#include "checks.h"

namespace pykernels::cpu {

using Tensors = std::vector<Tensor>;

// The dtype as the C shim numbers it: ScalarType is looked up through a chain of calls.
inline int32_t dtype_code(const Tensor& tensor) {
  int32_t code = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &code));
  return code;
}

inline int32_t dtype_code(ScalarType dtype) {
  return torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
}

inline std::string item(const char* list, size_t i) { return std::string(list) + "[" + std::to_string(i) + "]"; }

inline std::string names(const std::vector<ScalarType>& dtypes) {
  std::string text;
  for (size_t i = 0; i < dtypes.size(); ++i)
    text += (i == 0 ? "" : i + 1 == dtypes.size() ? " or " : ", ") + dtype_name(dtypes[i]);
  return text;
}

inline const std::vector<ScalarType>& float_dtypes() {
  static const std::vector<ScalarType> all{ScalarType::Float, ScalarType::BFloat16, ScalarType::Half,
                                           ScalarType::Double};
  return all;
}

inline bool holds(const std::vector<ScalarType>& dtypes, ScalarType dtype) {
  return std::find(dtypes.begin(), dtypes.end(), dtype) != dtypes.end();
}

inline void check_one_of(const char* op, const std::string& name, const Tensor& tensor,
                         const std::vector<ScalarType>& accepted) {
  STD_TORCH_CHECK(holds(accepted, tensor.scalar_type()), op, ": expected ", name, " to be ", names(accepted), ", got ",
                  dtype_name(tensor.scalar_type()));
}

inline DType wide_dtype(ScalarType dtype) { return dtype == ScalarType::Double ? DType::f64 : float_dtype(dtype); }

inline void check_contiguous(const char* op, const char* list, size_t i, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_contiguous(), op, ": expected ", item(list, i), " to be contiguous, got strides ",
                  shape_name(tensor.strides()));
}

// A list whose tensors all have the dtype of the first, which is one of those accepted; text only where one has not.
inline void check_list_dtype(const char* op, const char* list, const Tensors& tensors,
                             const std::vector<ScalarType>& accepted) {
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (i > 0 && dtype_code(tensors[i]) == dtype_code(tensors[0])) continue;
    check_one_of(op, item(list, i), tensors[i], accepted);
  }
}

inline void check_same(const char* op, const char* list, size_t j, const Tensor& tensor, size_t i, const Tensor& p) {
  const auto sizes = tensor.sizes(), wanted = p.sizes();
  const bool same = std::equal(sizes.begin(), sizes.end(), wanted.begin(), wanted.end()) && tensor.is_contiguous();
  STD_TORCH_CHECK(same, op, ": expected ", item(list, j), " to be contiguous of the shape of ", item("params", i), ", ",
                  shape_name(wanted), ", got ", shape_name(sizes));
  STD_TORCH_CHECK(tensor.is_cpu(), op, ": expected ", item(list, j), " on the device of ", item("params", i), ", cpu");
}

inline int slots_of(OptimizerRule& rule) {
  const auto flag = [&](int bit) { return (rule.flags & bit) != 0; };
  const auto slot = [&](bool is_signed) { rule.slot_signed[rule.slots++] = is_signed; };
  rule.slots = 0;
  switch (rule.algorithm) {
    case Algorithm::adam:
    case Algorithm::lamb:
      slot(true), slot(false);
      if (flag(kAmsgrad)) slot(false);
      break;
    case Algorithm::lion:
      slot(true);
      break;
    case Algorithm::sgd:
      if (flag(kMomentum)) slot(true);
      break;
    case Algorithm::adagrad:
      slot(false);
      break;
    case Algorithm::rmsprop:
      slot(false);
      if (flag(kMomentum)) slot(true);
      if (flag(kCentered)) slot(true);
  }
  return rule.slots;
}

struct OptimizerLists {
  const Tensors &params, &grads, &states, &scales, &extras, &steps;
};

struct OptimizerArguments {
  int64_t algorithm, flags;
  double beta1, beta2, eps, weight_decay;
  int64_t rounding, block_size;
};

// Checks every list and says what the tensors share.
OptimizerRule check_lists(const char* op, const OptimizerArguments& args, const OptimizerLists& lists);

// The tensors without what depends on their step; place: as the operator's argument.
std::vector<OptimizerTensor> optimizer_tensors(const OptimizerRule& rule, const OptimizerLists& lists,
                                               const std::vector<int64_t>& place);

// What the learning rate is multiplied by beside the ratio, as the reference's `factor`.
double length_factor(const OptimizerRule& rule, uint32_t step);
void set_step(const OptimizerRule& rule, uint32_t step, OptimizerTensor& tensor);

// A scalar tensor, float32 or float64.
double check_scalar(const char* op, const char* name, const Tensor& tensor);

}  // namespace pykernels::cpu
