#include "../../launchers/distillation.h"

#include <optional>

#include "checks.h"

namespace pykernels::cpu {
namespace {

// The numbers of the schema, in its order.
struct Spec {
  int64_t divergence;
  double beta;
  double temperature;
  double hard_weight;
  int64_t ignore_index;
};

// The arguments all three operators share, checked; `rows` and `labels` keep the memory alive.
struct Call {
  Rows student;
  Rows teacher;
  std::optional<Tensor> labels;
  DistillationRows args;

  Call(const char* op, const Tensor& s, const Tensor& t, const std::optional<Tensor>& target, const Spec& spec)
      : student((check_logits(op, "student", s), s)), teacher((check_logits(op, "teacher", t), t)) {
    STD_TORCH_CHECK(student.sizes == teacher.sizes, op, ": expected teacher to have the shape of student, ",
                    shape_name(student.sizes), ", got ", shape_name(teacher.sizes));
    STD_TORCH_CHECK(student.K > 0, op, ": expected student to have a vocabulary of at least 1, got 0");
    STD_TORCH_CHECK(spec.divergence >= 0 && spec.divergence <= 3, op, ": expected divergence to be 0, 1, 2 or 3, got ",
                    spec.divergence);
    STD_TORCH_CHECK(spec.temperature > 0, op, ": expected temperature to be positive, got ", spec.temperature);
    args.divergence = static_cast<Divergence>(spec.divergence);
    STD_TORCH_CHECK(args.divergence != Divergence::jsd || (spec.beta > 0 && spec.beta < 1), op,
                    ": expected beta to be inside (0, 1), got ", spec.beta);
    args.student = student.tensor.const_data_ptr();
    args.student_dtype = float_dtype(s.scalar_type());
    args.student_stride = student.stride;
    args.teacher = teacher.tensor.const_data_ptr();
    args.teacher_dtype = float_dtype(t.scalar_type());
    args.teacher_stride = teacher.stride;
    args.V = student.K;
    args.beta = static_cast<float>(spec.beta);
    args.temperature = static_cast<float>(spec.temperature);
    args.hard_weight = static_cast<float>(spec.hard_weight);
    args.ignore_index = spec.ignore_index;
    if (target.has_value()) check_target(op, *target);
  }

  std::vector<int64_t> leading() const { return {student.sizes.begin(), student.sizes.end() - 1}; }

  // One float32 value for each row.
  Tensor check_scale(const char* op, const char* name, const Tensor& scale) const {
    check_dtype(op, name, scale, ScalarType::Float);
    check_shape(op, name, scale, "value");
    return torch::stable::contiguous(scale);
  }

  void run() {
    torch::stable::parallel_for(0, student.M, grain_of(student.K),
                                [&](int64_t begin, int64_t end) { distillation_rows(args, begin, end); });
  }

 private:
  static void check_logits(const char* op, const char* name, const Tensor& logits) {
    check_float(op, name, logits);
    STD_TORCH_CHECK(logits.is_cpu(), op, ": expected ", name, " to be on the CPU");
    STD_TORCH_CHECK(logits.dim() >= 1, op, ": expected ", name, " to have at least 1 dimension, got 0");
  }

  void check_shape(const char* op, const char* name, const Tensor& tensor, const char* what) const {
    STD_TORCH_CHECK(tensor.is_cpu(), op, ": expected ", name, " to be on the CPU, as student is");
    const auto sizes = tensor.sizes();
    const std::vector<int64_t> got(sizes.begin(), sizes.end());
    STD_TORCH_CHECK(got == leading(), op, ": expected ", name, " to have shape ", shape_name(leading()), ", one ", what,
                    " for each row of student, got ", shape_name(got));
  }

  void check_target(const char* op, const Tensor& target) {
    check_dtype(op, "target", target, ScalarType::Long);
    check_shape(op, "target", target, "label");
    labels = torch::stable::contiguous(target);
    args.target = static_cast<const int64_t*>(labels->const_data_ptr());
    for (int64_t m = 0; m < student.M; ++m)
      STD_TORCH_CHECK(args.target[m] == args.ignore_index || (args.target[m] >= 0 && args.target[m] < args.V), op,
                      ": expected target to be in [0, ", args.V, ") or ignore_index (", args.ignore_index, "), got ",
                      args.target[m]);
  }
};

Tensor rows_cpu(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& target, int64_t divergence,
                double beta, double temperature, double hard_weight, int64_t ignore_index) {
  Call call("distillation_rows", student, teacher, target, {divergence, beta, temperature, hard_weight, ignore_index});
  Tensor loss = empty_cpu(call.leading(), ScalarType::Float);
  call.args.loss = static_cast<float*>(loss.mutable_data_ptr());
  call.run();
  return loss;
}

Tensor backward_cpu(const Tensor& grad, const Tensor& student, const Tensor& teacher,
                    const std::optional<Tensor>& target, int64_t divergence, double beta, double temperature,
                    double hard_weight, int64_t ignore_index) {
  constexpr const char* kOp = "distillation_rows_backward";
  Call call(kOp, student, teacher, target, {divergence, beta, temperature, hard_weight, ignore_index});
  const Tensor scale = call.check_scale(kOp, "grad", grad);
  Tensor out = empty_result(call.student.sizes, student.scalar_type());
  call.args.scale = static_cast<const float*>(scale.const_data_ptr());
  call.args.grad = out.mutable_data_ptr();
  call.args.grad_stride = call.args.V;
  call.run();
  return out;
}

Tensor inplace_cpu(Tensor student, const Tensor& teacher, const std::optional<Tensor>& target, const Tensor& scale,
                   int64_t divergence, double beta, double temperature, double hard_weight, int64_t ignore_index) {
  constexpr const char* kOp = "distillation_rows_grad_";
  Call call(kOp, student, teacher, target, {divergence, beta, temperature, hard_weight, ignore_index});
  STD_TORCH_CHECK(
      call.student.tensor.const_data_ptr() == student.const_data_ptr(), kOp,
      ": expected student to be written in place, with stride 1 along the vocabulary and one stride between "
      "rows");
  const Tensor values = call.check_scale(kOp, "scale", scale);
  Tensor loss = empty_cpu(call.leading(), ScalarType::Float);
  call.args.loss = static_cast<float*>(loss.mutable_data_ptr());
  call.args.scale = static_cast<const float*>(values.const_data_ptr());
  call.args.grad = student.mutable_data_ptr();
  call.args.grad_stride = call.student.stride;
  call.run();
  return loss;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykernels, CPU, m) {
  m.impl("distillation_rows", TORCH_BOX(&rows_cpu));
  m.impl("distillation_rows_backward", TORCH_BOX(&backward_cpu));
  m.impl("distillation_rows_grad_", TORCH_BOX(&inplace_cpu));
}

}  // namespace pykernels::cpu
