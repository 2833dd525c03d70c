#include "optimizer_lists.h"

namespace pykernels::cpu {
namespace {

void check_length(const char* op, const char* name, size_t got, size_t wanted) {
  STD_TORCH_CHECK(got == wanted, op, ": expected ", name, " to have ", wanted, " tensors, got ", got);
}

void check_params(const char* op, const OptimizerLists& lists, const OptimizerRule& rule) {
  const auto& [params, grads, states, scales, extras, steps] = lists;
  if (params.empty()) return;
  const int32_t param_code = dtype_code(params[0]), grad_code = dtype_code(grads[0]);
  const int32_t f32 = dtype_code(ScalarType::Float);
  const bool split = rule.rounding == Rounding::split_master;
  for (size_t i = 0; i < params.size(); ++i) {
    const Tensor &p = params[i], &g = grads[i];
    if (i == 0 || dtype_code(p) != param_code) check_one_of(op, item("params", i), p, float_dtypes());
    check_contiguous(op, "params", i, p);
    check_contiguous(op, "grads", i, g);
    STD_TORCH_CHECK(dtype_code(p) == param_code, op, ": expected ", item("params", i), " to be torch.",
                    dtype_name(params[0].scalar_type()), " as params[0], got torch.", dtype_name(p.scalar_type()));
    if (i == 0 || dtype_code(g) != grad_code) check_one_of(op, item("grads", i), g, float_dtypes());
    STD_TORCH_CHECK(dtype_code(g) == grad_code, op, ": expected ", item("grads", i), " to have the dtype of grads[0]");
    check_same(op, "grads", i, g, i, p);
    if (dtype_code(steps[i]) != f32) check_one_of(op, item("steps", i), steps[i], {ScalarType::Float});
    STD_TORCH_CHECK(steps[i].numel() == 1, op, ": expected ", item("steps", i), " to have 1 element, got ",
                    steps[i].numel());
    if (extras.empty()) continue;
    check_one_of(op, item("extras", i), extras[i], {split ? ScalarType::Short : p.scalar_type()});
    check_same(op, "extras", i, extras[i], i, p);
    STD_TORCH_CHECK(!split || p.scalar_type() == ScalarType::BFloat16, op, ": expected ", item("params", i),
                    " to be bfloat16 for split_master, got torch.", dtype_name(p.scalar_type()));
  }
}

void check_scale(const char* op, const OptimizerLists& lists, size_t j, size_t i, int64_t block_size) {
  const Tensor &p = lists.params[i], &scale = lists.scales[j];
  const auto sizes = p.sizes(), got = scale.sizes();
  STD_TORCH_CHECK(sizes.size() >= 2, op, ": expected ", item("params", i),
                  " with 8-bit state to have at least 2 dimensions");
  int64_t rest = 1;
  for (size_t d = 1; d < sizes.size(); ++d) rest *= sizes[d];
  const int64_t blocks = (rest + block_size - 1) / block_size;
  check_one_of(op, item("scales", j), scale, {ScalarType::Float});
  STD_TORCH_CHECK(got.size() == 2 && got[0] == sizes[0] && got[1] == blocks && scale.is_contiguous(), op, ": expected ",
                  item("scales", j), " to be contiguous of shape [", sizes[0], ", ", blocks, "], got ",
                  shape_name(got));
}

void check_states(const char* op, const OptimizerLists& lists, const OptimizerRule& rule) {
  const auto& [params, grads, states, scales, extras, steps] = lists;
  const size_t n = params.size();
  for (size_t j = 0; j < states.size(); ++j) {
    const size_t i = j % n, slot = j / n;
    check_same(op, "states", j, states[j], i, params[i]);
    if (i == 0 || dtype_code(states[j]) != dtype_code(states[j - i])) {
      std::vector<ScalarType> accepted{ScalarType::Float, ScalarType::BFloat16};
      if (!scales.empty())
        accepted = {rule.slot_signed[slot] ? ScalarType::Char : ScalarType::Byte};
      else if (rule.param_dtype == DType::f64)
        accepted = {ScalarType::Double};
      STD_TORCH_CHECK(holds(accepted, states[j].scalar_type()), op, ": expected ", item("states", j), " to be ",
                      names(accepted), ", got torch.", dtype_name(states[j].scalar_type()));
    }
    STD_TORCH_CHECK(dtype_code(states[j]) == dtype_code(states[j - i]), op, ": expected ", item("states", j),
                    " to have the dtype of ", item("states", j - i));
    if (!scales.empty()) check_scale(op, lists, j, i, rule.block);
  }
}

}  // namespace

OptimizerRule check_lists(const char* op, const OptimizerArguments& args, const OptimizerLists& lists) {
  const auto& [params, grads, states, scales, extras, steps] = lists;
  STD_TORCH_CHECK(args.algorithm >= 0 && args.algorithm <= 5, op, ": expected algorithm to be from 0 to 5, got ",
                  args.algorithm);
  STD_TORCH_CHECK(args.rounding >= 0 && args.rounding <= 3, op, ": expected rounding to be from 0 to 3, got ",
                  args.rounding);
  STD_TORCH_CHECK(args.block_size > 0, op, ": expected block_size to be positive, got ", args.block_size);
  OptimizerRule rule;
  rule.algorithm = static_cast<Algorithm>(args.algorithm);
  rule.flags = static_cast<int>(args.flags);
  rule.rounding = static_cast<Rounding>(args.rounding);
  rule.beta1 = args.beta1, rule.beta2 = args.beta2, rule.eps = args.eps, rule.weight_decay = args.weight_decay;
  rule.block = args.block_size;
  const size_t n = params.size(), held = n * slots_of(rule);
  check_length(op, "grads", grads.size(), n);
  check_length(op, "states", states.size(), held);
  check_length(op, "steps", steps.size(), n);
  STD_TORCH_CHECK(scales.empty() || scales.size() == held, op, ": expected scales to have 0 or ", held,
                  " tensors, got ", scales.size());
  const bool wants_extra = rule.rounding == Rounding::kahan || rule.rounding == Rounding::split_master;
  check_length(op, "extras", extras.size(), wants_extra ? n : 0);
  check_params(op, lists, rule);
  if (n > 0) {
    rule.param_dtype = wide_dtype(params[0].scalar_type());
    rule.grad_dtype = wide_dtype(grads[0].scalar_type());
  }
  check_states(op, lists, rule);
  rule.state = rule.param_dtype == DType::f64 ? StateKind::f64 : StateKind::f32;
  if (!scales.empty()) rule.state = StateKind::codes;
  if (scales.empty() && !states.empty() && states[0].scalar_type() == ScalarType::BFloat16)
    rule.state = StateKind::bf16;
  if (rule.state != StateKind::codes) rule.block = kPlainBlock;
  return rule;
}

std::vector<OptimizerTensor> optimizer_tensors(const OptimizerRule& rule, const OptimizerLists& lists,
                                               const std::vector<int64_t>& place) {
  const auto& [params, grads, states, scales, extras, steps] = lists;
  const size_t n = params.size();
  const bool indexed = rule.state == StateKind::bf16 || rule.state == StateKind::codes ||
                       (rule.rounding == Rounding::stochastic && rule.param_dtype == DType::bf16);
  std::vector<OptimizerTensor> tensors(n);
  for (size_t i = 0; i < n; ++i) {
    OptimizerTensor& t = tensors[i];
    const auto sizes = params[i].sizes();
    const int64_t numel = params[i].numel();
    t.param = params[i].mutable_data_ptr();
    t.grad = grads[i].const_data_ptr();
    for (int j = 0; j < rule.slots; ++j) {
      t.state[j] = states[j * n + i].mutable_data_ptr();
      if (!scales.empty()) t.scale[j] = static_cast<float*>(scales[j * n + i].mutable_data_ptr());
    }
    if (!extras.empty()) t.extra = extras[i].mutable_data_ptr();
    t.rows = sizes.size() > 1 ? sizes[0] : 1;
    t.columns = numel / std::max<int64_t>(1, t.rows);
    t.stream = static_cast<uint32_t>(place.empty() ? static_cast<int64_t>(i) : place[3 * i]);
    t.start = place.empty() ? 0 : place[3 * i + 1];
    t.row_stride = place.empty() ? t.columns : place[3 * i + 2];
    if (rule.state != StateKind::codes && (!indexed || t.row_stride == t.columns)) t.rows = 1, t.columns = numel;
    if (numel == 0) t.rows = 0;
  }
  return tensors;
}

static double first_correction(const OptimizerRule& rule, uint32_t step) {
  return rule.flags & kUncorrected ? 1.0 : 1.0 / (1.0 - std::pow(rule.beta1, static_cast<double>(step)));
}

double length_factor(const OptimizerRule& rule, uint32_t step) {
  if (rule.algorithm == Algorithm::adam) return first_correction(rule, step);
  return rule.algorithm == Algorithm::adagrad ? 1.0 / (1.0 + (step - 1.0) * rule.beta1) : 1.0;
}

void set_step(const OptimizerRule& rule, uint32_t step, OptimizerTensor& tensor) {
  tensor.step = step;
  if (rule.algorithm != Algorithm::adam && rule.algorithm != Algorithm::lamb) return;
  if (!(rule.flags & kUncorrected))
    tensor.root = 1.0 / std::sqrt(1.0 - std::pow(rule.beta2, static_cast<double>(step)));
  if (rule.algorithm == Algorithm::lamb) tensor.direction = first_correction(rule, step);
}

double check_scalar(const char* op, const char* name, const Tensor& tensor) {
  check_one_of(op, name, tensor, {ScalarType::Float, ScalarType::Double});
  STD_TORCH_CHECK(tensor.numel() == 1, op, ": expected ", name, " to have 1 element, got ", tensor.numel());
  const void* data = tensor.const_data_ptr();
  return tensor.scalar_type() == ScalarType::Double ? *static_cast<const double*>(data)
                                                    : static_cast<double>(*static_cast<const float*>(data));
}

}  // namespace pykernels::cpu
