// optimizer_update_ and optimizer_norms. All tensors of a call are one range of work, cut at blocks, so that 300 small
// tensors cost what one of their size does.
#include "../../launchers/optimizer.h"

#include <algorithm>

#include "optimizer_lists.h"

namespace pykernels::cpu {
namespace {

constexpr const char* kUpdate = "optimizer_update_";
constexpr const char* kNorms = "optimizer_norms";
constexpr int64_t kGrain = 32768;
// What a block costs beside its elements, in elements.
constexpr int64_t kBlockCost = 16;
// Elements whose squares are added up by one thread, whatever the number of threads.
constexpr int64_t kNormSpan = 65536;

// Where the work of each tensor begins in that of all, and what a block of it costs.
struct Work {
  std::vector<int64_t> starts{0};
  std::vector<int64_t> costs;

  Work(const OptimizerRule& rule, const std::vector<OptimizerTensor>& tensors) {
    starts.reserve(tensors.size() + 1), costs.reserve(tensors.size());
    for (const OptimizerTensor& t : tensors) {
      const int64_t blocks = t.blocks(rule.block);
      costs.push_back(kBlockCost + (blocks == 0 ? 0 : (t.rows * t.columns + blocks - 1) / blocks));
      starts.push_back(starts.back() + blocks * costs.back());
    }
  }

  // Calls run(tensor, begin, end) for the blocks that begin in [begin, end).
  template <class Run>
  void each(int64_t begin, int64_t end, const Run& run) const {
    size_t i = std::upper_bound(starts.begin(), starts.end(), begin) - starts.begin() - 1;
    for (; i < costs.size() && starts[i] < end; ++i) {
      const auto first_from = [&](int64_t position) {
        return (std::clamp(position, starts[i], starts[i + 1]) - starts[i] + costs[i] - 1) / costs[i];
      };
      const int64_t from = first_from(begin), to = first_from(end);
      if (from < to) run(i, from, to);
    }
  }
};

void optimizer_update_cpu(int64_t algorithm, int64_t flags, const Tensors& params, const Tensors& grads,
                          const Tensors& states, const Tensors& scales, const Tensors& extras, const Tensors& steps,
                          const Tensor& lr, double beta1, double beta2, double eps, double weight_decay,
                          int64_t rounding, int64_t seed, const std::vector<int64_t>& place, int64_t block_size,
                          const std::optional<Tensor>& ratio, const std::optional<Tensor>& grad_scale,
                          const std::optional<Tensor>& found_inf) {
  const OptimizerLists lists{params, grads, states, scales, extras, steps};
  OptimizerRule rule =
      check_lists(kUpdate, {algorithm, flags, beta1, beta2, eps, weight_decay, rounding, block_size}, lists);
  const size_t n = params.size();
  const double rate = check_scalar(kUpdate, "lr", lr);
  if (grad_scale) rule.grad_scale = check_scalar(kUpdate, "grad_scale", *grad_scale);
  const bool skipped = found_inf && check_scalar(kUpdate, "found_inf", *found_inf) != 0.0;
  STD_TORCH_CHECK(place.empty() || place.size() == 3 * n, kUpdate, ": expected place to have 0 or ", 3 * n,
                  " integers, got ", place.size());
  const float* ratios = nullptr;
  std::optional<Tensor> ratio_values;
  if (ratio) {
    check_dtype(kUpdate, "ratio", *ratio, ScalarType::Float);
    STD_TORCH_CHECK(ratio->dim() == 1 && ratio->numel() == static_cast<int64_t>(n), kUpdate,
                    ": expected ratio to have shape [", n, "], got ", shape_name(ratio->sizes()));
    ratio_values = torch::stable::contiguous(*ratio);
    ratios = static_cast<const float*>(ratio_values->const_data_ptr());
  }
  if (skipped) return;

  rule.seed = static_cast<uint64_t>(seed);
  std::vector<OptimizerTensor> tensors = optimizer_tensors(rule, lists, place);
  for (size_t i = 0; i < n; ++i) {
    float* count = static_cast<float*>(steps[i].mutable_data_ptr());
    *count += 1.0f;
    OptimizerTensor& t = tensors[i];
    set_step(rule, static_cast<uint32_t>(*count), t);
    t.length = rate * length_factor(rule, t.step) * (ratios == nullptr ? 1.0 : static_cast<double>(ratios[i]));
    t.decay = 1.0 - rate * weight_decay;
  }
  const Work work(rule, tensors);
  torch::stable::parallel_for(0, work.starts.back(), kGrain, [&](int64_t begin, int64_t end) {
    work.each(begin, end, [&](size_t i, int64_t from, int64_t to) { optimizer_update(rule, tensors[i], from, to); });
  });
}

Tensor optimizer_norms_cpu(int64_t algorithm, int64_t flags, const Tensors& params, const Tensors& grads,
                           const Tensors& states, const Tensors& scales, const Tensors& extras, const Tensors& steps,
                           double beta1, double beta2, double eps, double weight_decay, int64_t rounding,
                           int64_t block_size, const std::optional<Tensor>& grad_scale) {
  const OptimizerLists lists{params, grads, states, scales, extras, steps};
  OptimizerRule rule =
      check_lists(kNorms, {algorithm, flags, beta1, beta2, eps, weight_decay, rounding, block_size}, lists);
  STD_TORCH_CHECK(!params.empty(), kNorms, ": expected params to have at least 1 tensor, got 0");
  if (grad_scale) rule.grad_scale = check_scalar(kNorms, "grad_scale", *grad_scale);
  std::vector<OptimizerTensor> tensors = optimizer_tensors(rule, lists, {});

  struct Span {
    size_t tensor;
    int64_t begin, end;
    double sums[2];
  };
  std::vector<Span> spans;
  for (size_t i = 0; i < tensors.size(); ++i) {
    OptimizerTensor& t = tensors[i];
    const float made = *static_cast<const float*>(steps[i].const_data_ptr());
    set_step(rule, static_cast<uint32_t>(made) + 1, t);
    const int64_t blocks = t.blocks(rule.block);
    const int64_t each = std::max<int64_t>(1, kNormSpan / std::clamp<int64_t>(t.columns, 1, rule.block));
    for (int64_t b = 0; b < blocks; b += each) spans.push_back({i, b, std::min(blocks, b + each), {0.0, 0.0}});
  }
  torch::stable::parallel_for(0, static_cast<int64_t>(spans.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s)
      optimizer_norms(rule, tensors[spans[s].tensor], spans[s].begin, spans[s].end, spans[s].sums);
  });

  std::vector<double> total(2 * tensors.size());
  for (const Span& span : spans)
    for (int j = 0; j < 2; ++j) total[2 * span.tensor + j] += span.sums[j];
  Tensor out = empty_cpu({static_cast<int64_t>(tensors.size()), 2}, ScalarType::Float);
  float* result = static_cast<float*>(out.mutable_data_ptr());
  for (size_t i = 0; i < tensors.size(); ++i) {
    const double factor = length_factor(rule, tensors[i].step);
    result[2 * i] = static_cast<float>(total[2 * i]);
    result[2 * i + 1] = static_cast<float>(total[2 * i + 1] * factor * factor);
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykernels, CPU, m) {
  m.impl("optimizer_update_", TORCH_BOX(&optimizer_update_cpu));
  m.impl("optimizer_norms", TORCH_BOX(&optimizer_norms_cpu));
}

}  // namespace pykernels::cpu
