#include "../../launchers/cross_entropy.h"

#include <optional>
#include <tuple>

#include "checks.h"

namespace pykernels::cpu {
namespace {

// The arguments every entry takes, checked, with what keeps their memory alive.
struct Call {
  const char* op;
  Rows logits;
  Tensor target;
  std::optional<Tensor> weight;
  CrossEntropy args;

  Call(const char* op, const Tensor& logits_in, const Tensor& target_in, const std::optional<Tensor>& weight_in,
       int64_t ignore_index, double softcap, int64_t first_class, int64_t num_classes)
      : op(op), logits(checked(op, logits_in)), target(torch::stable::contiguous(target_in)) {
    check_dtype(op, "target", target_in, ScalarType::Long);
    check_cpu(op, "target", target_in);
    const auto sizes = target_in.sizes();
    STD_TORCH_CHECK(
        sizes.size() + 1 == logits.sizes.size() && std::equal(sizes.begin(), sizes.end(), logits.sizes.begin()), op,
        ": expected target to have shape ",
        shape_name(std::vector<int64_t>(logits.sizes.begin(), logits.sizes.end() - 1)),
        ", one class for each row of logits, got ", shape_name(sizes));
    if (num_classes == 0) num_classes = logits.K;
    STD_TORCH_CHECK(first_class >= 0 && first_class + logits.K <= num_classes, op, ": expected the ", logits.K,
                    " columns of logits from class ", first_class, " on to be within ", num_classes);
    args.logits = logits.tensor.const_data_ptr();
    args.dtype = float_dtype(logits_in.scalar_type());
    args.stride = logits.stride;
    args.columns = logits.K;
    args.target = static_cast<const int64_t*>(target.const_data_ptr());
    args.ignore_index = ignore_index;
    args.softcap = static_cast<float>(softcap);
    args.first_class = first_class;
    args.num_classes = num_classes;
    args.weight_sum = static_cast<float>(num_classes);
    if (weight_in.has_value()) take_weight(*weight_in);
    check_targets();
  }

  // rows of float32 that go with those of logits; strides other than 1 are copied away.
  Tensor per_row(const char* name, const Tensor& rows) const {
    check_dtype(op, name, rows, ScalarType::Float);
    check_cpu(op, name, rows);
    STD_TORCH_CHECK(rows.numel() == logits.M && rows.dim() == target.dim(), op, ": expected ", name, " to have shape ",
                    shape_name(target.sizes()), ", one value for each row, got ", shape_name(rows.sizes()));
    return rows.dim() == 1 ? rows : torch::stable::contiguous(rows);
  }

 private:
  static const Tensor& checked(const char* op, const Tensor& logits) {
    check_float(op, "logits", logits);
    STD_TORCH_CHECK(logits.dim() >= 1 && logits.size(logits.dim() - 1) >= 1, op,
                    ": expected logits to have shape [..., V] with V at least 1, got ", shape_name(logits.sizes()));
    return logits;
  }

  void take_weight(const Tensor& given) {
    check_dtype(op, "weight", given, ScalarType::Float);
    check_cpu(op, "weight", given);
    STD_TORCH_CHECK(given.dim() == 1 && given.numel() == args.num_classes, op, ": expected weight to have shape [",
                    args.num_classes, "], one value for each class, got ", shape_name(given.sizes()));
    weight = torch::stable::contiguous(given);
    args.weight = static_cast<const float*>(weight->const_data_ptr());
    double sum = 0.0;
    for (int64_t c = 0; c < args.num_classes; ++c) sum += args.weight[c];
    args.weight_sum = static_cast<float>(sum);
  }

  void check_targets() const {
    for (int64_t m = 0; m < logits.M; ++m) {
      const int64_t c = args.target[m];
      STD_TORCH_CHECK(c == args.ignore_index || (c >= 0 && c < args.num_classes), op,
                      ": expected target to be within [0, ", args.num_classes, ") or ignore_index (", args.ignore_index,
                      "), got ", c, " at row ", m);
    }
  }
};

std::tuple<Tensor, Tensor, Tensor> cross_entropy_cpu(const Tensor& logits, const Tensor& target,
                                                     const std::optional<Tensor>& weight, int64_t ignore_index,
                                                     double label_smoothing, double z_loss, double softcap) {
  Call call("cross_entropy", logits, target, weight, ignore_index, softcap, 0, 0);
  call.args.label_smoothing = static_cast<float>(label_smoothing);
  call.args.z_loss = static_cast<float>(z_loss);
  const std::vector<int64_t> sizes(call.logits.sizes.begin(), call.logits.sizes.end() - 1);
  Tensor loss = empty_cpu(sizes, ScalarType::Float), lse = empty_cpu(sizes, ScalarType::Float);
  Tensor correct = empty_cpu(sizes, ScalarType::Bool);
  const CrossEntropyLosses losses{static_cast<float*>(loss.mutable_data_ptr()),
                                  static_cast<float*>(lse.mutable_data_ptr()),
                                  static_cast<bool*>(correct.mutable_data_ptr())};
  torch::stable::parallel_for(0, call.logits.M, grain_of(call.args.columns),
                              [&](int64_t begin, int64_t end) { cross_entropy(call.args, losses, begin, end); });
  return {loss, lse, correct};
}

// Writes the gradient of call's logits into out, whose rows are `stride` apart.
void run_backward(Call& call, const Tensor& grad, const std::optional<Tensor>& grad_lse, const Tensor& lse,
                  double label_smoothing, double z_loss, void* out, int64_t stride) {
  call.args.label_smoothing = static_cast<float>(label_smoothing);
  call.args.z_loss = static_cast<float>(z_loss);
  const Tensor grads = call.per_row("grad", grad), lses = torch::stable::contiguous(call.per_row("lse", lse));
  std::optional<Tensor> grad_lses;
  CrossEntropyBackward backward;
  if (grad_lse.has_value()) {
    grad_lses = torch::stable::contiguous(call.per_row("grad_lse", *grad_lse));
    backward.grad_lse = static_cast<const float*>(grad_lses->const_data_ptr());
  }
  backward.grad = static_cast<const float*>(grads.const_data_ptr());
  backward.grad_stride = grads.dim() == 1 ? grads.stride(0) : 1;
  backward.lse = static_cast<const float*>(lses.const_data_ptr());
  backward.out = out;
  backward.out_stride = stride;
  torch::stable::parallel_for(0, call.logits.M, grain_of(call.args.columns), [&](int64_t begin, int64_t end) {
    cross_entropy_backward(call.args, backward, begin, end);
  });
}

Tensor cross_entropy_backward_cpu(const Tensor& grad, const std::optional<Tensor>& grad_lse, const Tensor& logits,
                                  const Tensor& target, const std::optional<Tensor>& weight, const Tensor& lse,
                                  int64_t ignore_index, double label_smoothing, double z_loss, double softcap) {
  Call call("cross_entropy_backward", logits, target, weight, ignore_index, softcap, 0, 0);
  Tensor out = empty_result(call.logits.sizes, logits.scalar_type());
  run_backward(call, grad, grad_lse, lse, label_smoothing, z_loss, out.mutable_data_ptr(), call.logits.K);
  return out;
}

void check_matrix(const char* op, const Tensor& logits, bool written) {
  STD_TORCH_CHECK(logits.dim() == 2, op, ": expected logits to have 2 dimensions, got ", logits.dim());
  STD_TORCH_CHECK(!written || logits.stride(1) == 1 || logits.size(1) == 1, op,
                  ": expected logits, which are written over, to have stride 1 along a row, got ", logits.stride(1));
}

void cross_entropy_backward_inplace_cpu(const Tensor& grad, const std::optional<Tensor>& grad_lse, Tensor logits,
                                        const Tensor& target, const std::optional<Tensor>& weight, const Tensor& lse,
                                        int64_t ignore_index, double label_smoothing, double z_loss, double softcap,
                                        int64_t first_class, int64_t num_classes) {
  constexpr const char* kOp = "cross_entropy_backward_";
  check_matrix(kOp, logits, true);
  Call call(kOp, logits, target, weight, ignore_index, softcap, first_class, num_classes);
  run_backward(call, grad, grad_lse, lse, label_smoothing, z_loss, logits.mutable_data_ptr(), call.logits.stride);
}

void cross_entropy_update_cpu(Tensor state, const Tensor& logits, const Tensor& target,
                              const std::optional<Tensor>& weight, int64_t ignore_index, double softcap,
                              int64_t first_class) {
  constexpr const char* kOp = "cross_entropy_update_";
  check_matrix(kOp, logits, false);
  // Without weights nothing says how many classes there are, and nothing needs to know.
  const int64_t classes = weight.has_value() ? weight->numel() : INT64_MAX;
  const Call call(kOp, logits, target, weight, ignore_index, softcap, first_class, classes);
  check_dtype(kOp, "state", state, ScalarType::Float);
  check_cpu(kOp, "state", state);
  STD_TORCH_CHECK(state.dim() == 2 && state.size(0) == call.logits.M && state.size(1) == kCrossEntropyState &&
                      state.is_contiguous(),
                  kOp, ": expected state to be contiguous of shape [", call.logits.M, ", ", kCrossEntropyState,
                  "], got ", shape_name(state.sizes()));
  float* out = static_cast<float*>(state.mutable_data_ptr());
  torch::stable::parallel_for(0, call.logits.M, grain_of(call.args.columns),
                              [&](int64_t begin, int64_t end) { cross_entropy_update(call.args, out, begin, end); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykernels, CPU, m) {
  m.impl("cross_entropy", TORCH_BOX(&cross_entropy_cpu));
  m.impl("cross_entropy_backward", TORCH_BOX(&cross_entropy_backward_cpu));
  m.impl("cross_entropy_backward_", TORCH_BOX(&cross_entropy_backward_inplace_cpu));
  m.impl("cross_entropy_update_", TORCH_BOX(&cross_entropy_update_cpu));
}

}  // namespace pykernels::cpu
