// squared_norms and scale_tensors_. All tensors of a call are cut into spans of one length, so that a sum does not
// depend on the number of threads.
#include "../../launchers/optimizer.h"

#include <algorithm>

#include "optimizer_lists.h"

namespace pykernels::cpu {
namespace {

constexpr const char* kNorms = "squared_norms";
constexpr const char* kScale = "scale_tensors_";
constexpr int64_t kSpan = 65536;

struct Span {
  size_t tensor;
  char* data;
  int64_t count;
  DType dtype;
  double sum;
};

std::vector<Span> check_tensors(const char* op, const Tensors& tensors, bool writes) {
  STD_TORCH_CHECK(!tensors.empty(), op, ": expected tensors to have at least 1 tensor, got 0");
  std::vector<Span> spans;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor& tensor = tensors[i];
    check_one_of(op, item("tensors", i), tensor, float_dtypes());
    check_contiguous(op, "tensors", i, tensor);
    STD_TORCH_CHECK(tensor.is_cpu(), op, ": expected ", item("tensors", i), " on the device of tensors[0]");
    const DType dtype = wide_dtype(tensor.scalar_type());
    const int64_t n = tensor.numel(), size = static_cast<int64_t>(tensor.element_size());
    char* data = static_cast<char*>(writes ? tensor.mutable_data_ptr() : const_cast<void*>(tensor.const_data_ptr()));
    for (int64_t k = 0; k < n; k += kSpan) spans.push_back({i, data + k * size, std::min(kSpan, n - k), dtype, 0.0});
  }
  return spans;
}

template <class Run>
void each_span(std::vector<Span>& spans, const Run& run) {
  torch::stable::parallel_for(0, static_cast<int64_t>(spans.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) run(spans[s]);
  });
}

Tensor squared_norms_cpu(const Tensors& tensors) {
  std::vector<Span> spans = check_tensors(kNorms, tensors, false);
  each_span(spans, [](Span& span) { span.sum = squared_norm(span.data, span.dtype, span.count); });
  Tensor out = empty_cpu({static_cast<int64_t>(tensors.size())}, ScalarType::Double);
  double* result = static_cast<double*>(out.mutable_data_ptr());
  std::fill(result, result + tensors.size(), 0.0);
  for (const Span& span : spans) result[span.tensor] += span.sum;
  return out;
}

void scale_tensors_cpu(const Tensors& tensors, const Tensor& factor) {
  std::vector<Span> spans = check_tensors(kScale, tensors, true);
  const double value = check_scalar(kScale, "factor", factor);
  if (value == 1.0) return;
  each_span(spans, [&](Span& span) { scale_tensor(span.data, span.dtype, span.count, value); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykernels, CPU, m) {
  m.impl("squared_norms", TORCH_BOX(&squared_norms_cpu));
  m.impl("scale_tensors_", TORCH_BOX(&scale_tensors_cpu));
}

}  // namespace pykernels::cpu
