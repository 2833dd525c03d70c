#include "../optimizer_update.h"

#include "checks.h"

namespace pykernels::cuda {
namespace {

constexpr const char* kOp = "optimizer_update_";

using Tensors = std::vector<Tensor>;

Kind kind_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return Kind::f32;
    case ScalarType::Half:
      return Kind::f16;
    case ScalarType::BFloat16:
      return Kind::bf16;
    case ScalarType::Double:
      return Kind::f64;
    case ScalarType::Char:
      return Kind::i8;
    case ScalarType::Byte:
      return Kind::u8;
    case ScalarType::Short:
      return Kind::i16;
    default:
      return Kind::none;
  }
}

// The states of a rule in order: s of either sign, u never negative.
const char* slots(Rule rule, int64_t flags) {
  const bool momentum = flags & kMomentum, centered = flags & kCentered;
  switch (rule) {
    case Rule::adam:
    case Rule::lamb:
      return flags & kAmsgrad ? "suu" : "su";
    case Rule::lion:
      return "s";
    case Rule::sgd:
      return momentum ? "s" : "";
    case Rule::adagrad:
      return "u";
    default:
      return momentum && centered ? "uss" : momentum || centered ? "us" : "u";
  }
}

std::string at(const char* list, size_t i) { return std::string(list) + "[" + std::to_string(i) + "]"; }

void check_count(const char* name, size_t got, size_t want) {
  STD_TORCH_CHECK(got == want, kOp, ": expected ", name, " to have ", want, " tensors, got ", got);
}

void check_kind(const std::string& name, const Tensor& tensor, bool accepted, const char* accepts) {
  STD_TORCH_CHECK(accepted, kOp, ": expected ", name, " to be ", accepts, ", got ", dtype_name(tensor.scalar_type()));
}

// Contiguous, of the parameter's shape.
void check_same(const std::string& name, const Tensor& tensor, size_t i, const Tensor& p) {
  const auto sizes = tensor.sizes(), want = p.sizes();
  STD_TORCH_CHECK(std::equal(sizes.begin(), sizes.end(), want.begin(), want.end()) && tensor.is_contiguous(), kOp,
                  ": expected ", name, " to be contiguous of the shape of params[", i, "], ", shape_name(want),
                  ", got ", shape_name(sizes));
}

// The address the GPU uses; what is `pinned` may be in pinned host memory.
void* address(const std::string& name, const Tensor& tensor, size_t i, const Tensor& p, bool pinned) {
  void* data = tensor.mutable_data_ptr();
  if (tensor.is_cuda()) {
    check_device(kOp, name.c_str(), tensor, at("params", i).c_str(), p);
    return data;
  }
  void* mapped = nullptr;
  const char* error = !pinned ? "it is in host memory" : tensor.numel() == 0 ? nullptr : device_address(data, &mapped);
  STD_TORCH_CHECK(error == nullptr, kOp, ": expected ", name, " on the device of params[", i, "]",
                  pinned ? ", or in pinned host memory" : "", ": ", error != nullptr ? error : "");
  return mapped;
}

struct Scalar {
  const void* device = nullptr;
  Kind kind = Kind::none;
};

// A scalar the kernel reads on the device.
Scalar device_scalar(const char* name, const std::optional<Tensor>& scalar, const Tensor& like) {
  if (!scalar.has_value()) return {};
  const Kind kind = kind_of(scalar->scalar_type());
  check_kind(name, *scalar, kind == Kind::f32 || kind == Kind::f64, "float32 or float64");
  STD_TORCH_CHECK(scalar->numel() == 1, kOp, ": expected ", name, " to have 1 element, got ", scalar->numel());
  check_device(kOp, name, *scalar, "params[0]", like);
  return {scalar->const_data_ptr(), kind};
}

bool on_sixteen(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

void optimizer_update_cuda(int64_t rule, int64_t flags, const Tensors& params, const Tensors& grads,
                           const Tensors& states, const Tensors& scales, const Tensors& extras, const Tensors& steps,
                           const Tensor& lr, double beta1, double beta2, double eps, double weight_decay,
                           int64_t rounding, int64_t seed, const std::vector<int64_t>& place, int64_t block_size,
                           const std::optional<Tensor>& ratio, const std::optional<Tensor>& grad_scale,
                           const std::optional<Tensor>& found_inf) {
  const size_t n = params.size();
  STD_TORCH_CHECK(rule >= 0 && rule <= 5, kOp, ": expected algorithm to be from 0 to 5, got ", rule);
  STD_TORCH_CHECK(rounding >= 0 && rounding <= 3, kOp, ": expected rounding to be from 0 to 3, got ", rounding);
  STD_TORCH_CHECK(block_size > 0, kOp, ": expected block_size to be positive, got ", block_size);
  const std::string signs = slots(static_cast<Rule>(rule), flags);
  check_count("grads", grads.size(), n);
  check_count("states", states.size(), n * signs.size());
  check_count("steps", steps.size(), n);
  STD_TORCH_CHECK(scales.empty() || scales.size() == states.size(), kOp, ": expected scales to have 0 or ",
                  states.size(), " tensors, got ", scales.size());
  const auto how = static_cast<Rounding>(rounding);
  const bool wants_extra = how == Rounding::kahan || how == Rounding::split_master;
  check_count("extras", extras.size(), wants_extra ? n : 0);
  STD_TORCH_CHECK(place.empty() || place.size() == 3 * n, kOp, ": expected place to have 0 or ", 3 * n,
                  " integers, got ", place.size());
  if (n == 0) return;

  const Tensor& like = params[0];
  const DeviceGuard guard(like.get_device_index());
  const bool codes = !scales.empty();
  OptimizerUpdate args;
  args.rule = static_cast<Rule>(rule);
  args.flags = static_cast<int32_t>(flags);
  args.rounding = how;
  args.param_kind = kind_of(like.scalar_type());
  args.grad_kind = kind_of(grads[0].scalar_type());
  const bool wide = args.param_kind == Kind::f64;
  STD_TORCH_CHECK(!codes || !wide, kOp, ": expected params[0] with 8-bit state to be float32, bfloat16 or float16");
  STD_TORCH_CHECK(!codes || block_size <= (1 << 24), kOp, ": expected block_size to be at most ", 1 << 24, ", got ",
                  block_size);
  args.block_size = static_cast<int32_t>(std::min<int64_t>(block_size, 1 << 24));
  args.decay = weight_decay != 0.0;
  args.beta1 = beta1, args.beta2 = beta2, args.eps = eps, args.weight_decay = weight_decay;
  args.seed = static_cast<uint64_t>(seed);
  const Scalar scale_of_grads = device_scalar("grad_scale", grad_scale, like);
  const Scalar stop = device_scalar("found_inf", found_inf, like);
  args.grad_scale = scale_of_grads.device, args.grad_scale_kind = scale_of_grads.kind;
  args.found_inf = stop.device, args.found_inf_kind = stop.kind;
  if (lr.is_cuda()) {
    const Scalar rate = device_scalar("lr", lr, like);
    args.lr_device = rate.device, args.lr_kind = rate.kind;
  } else {
    const Kind kind = kind_of(lr.scalar_type());
    check_kind("lr", lr, kind == Kind::f32 || kind == Kind::f64, "float32 or float64");
    STD_TORCH_CHECK(lr.numel() == 1, kOp, ": expected lr to have 1 element, got ", lr.numel());
    const void* value = lr.const_data_ptr();
    args.lr = kind == Kind::f64 ? *static_cast<const double*>(value) : *static_cast<const float*>(value);
  }
  std::optional<Tensor> ratios;
  if (ratio.has_value()) {
    check_dtype(kOp, "ratio", *ratio, ScalarType::Float);
    STD_TORCH_CHECK(ratio->dim() == 1 && ratio->numel() == static_cast<int64_t>(n), kOp,
                    ": expected ratio to have shape [", n, "], got ", shape_name(ratio->sizes()));
    check_device(kOp, "ratio", *ratio, "params[0]", like);
    ratios = torch::stable::contiguous(*ratio);
    args.ratio = static_cast<const float*>(ratios->const_data_ptr());
  }

  bool host_steps = false;
  std::vector<UpdatedTensor> tensors(n);
  for (size_t i = 0; i < n; ++i) {
    const Tensor &p = params[i], &g = grads[i], &step = steps[i];
    UpdatedTensor& x = tensors[i];
    const Kind kind = kind_of(p.scalar_type()), grad_kind = kind_of(g.scalar_type());
    const auto is_float = [](Kind k) { return k >= Kind::f32 && k <= Kind::f64; };
    check_kind(at("params", i), p, is_float(kind), "float32, bfloat16, float16 or float64");
    check_kind(at("grads", i), g, is_float(grad_kind), "float32, bfloat16, float16 or float64");
    STD_TORCH_CHECK(kind == args.param_kind, kOp, ": expected params[", i, "] to be ", dtype_name(like.scalar_type()),
                    " as params[0], got ", dtype_name(p.scalar_type()));
    STD_TORCH_CHECK(grad_kind == args.grad_kind, kOp, ": expected grads[", i, "] to have the dtype of grads[0]");
    check_same(at("params", i), p, i, p);
    check_same(at("grads", i), g, i, p);
    x.param = address(at("params", i), p, 0, like, false);
    x.grad = address(at("grads", i), g, i, p, false);
    bool vector = on_sixteen(x.param) && on_sixteen(x.grad);
    check_dtype(kOp, at("steps", i).c_str(), step, ScalarType::Float);
    STD_TORCH_CHECK(step.numel() == 1, kOp, ": expected steps[", i, "] to have 1 element, got ", step.numel());
    if (step.is_cuda()) {
      x.step = static_cast<float*>(address(at("steps", i), step, i, p, false));
    } else {
      STD_TORCH_CHECK(!found_inf.has_value(), kOp, ": expected steps[", i, "] on the device of params[", i,
                      "] with found_inf, which only the device knows");
      x.host_step = *static_cast<const float*>(step.const_data_ptr());
      host_steps = true;
    }
    if (wants_extra) {
      const Kind extra = kind_of(extras[i].scalar_type());
      check_kind(at("extras", i), extras[i], extra == (how == Rounding::kahan ? kind : Kind::i16),
                 how == Rounding::kahan ? dtype_name(p.scalar_type()).c_str() : "int16");
      STD_TORCH_CHECK(how == Rounding::kahan || kind == Kind::bf16, kOp, ": expected params[", i,
                      "] to be bfloat16 for split_master, got ", dtype_name(p.scalar_type()));
      check_same(at("extras", i), extras[i], i, p);
      x.extra = address(at("extras", i), extras[i], i, p, true);
      args.extra_kind = extra;
      vector = vector && on_sixteen(x.extra);
    }
    int64_t rest = p.dim() > 1 ? 1 : p.numel();
    for (int64_t d = 1; d < p.dim(); ++d) rest *= p.size(d);
    for (size_t s = 0; s < signs.size(); ++s) {
      const size_t j = s * n + i;
      const Kind state = kind_of(states[j].scalar_type()), code = signs[s] == 's' ? Kind::i8 : Kind::u8;
      check_same(at("states", j), states[j], i, p);
      if (codes) {
        check_kind(at("states", j), states[j], state == code, code == Kind::i8 ? "int8" : "uint8");
        STD_TORCH_CHECK(p.dim() >= 2, kOp, ": expected params[", i, "] with 8-bit state to have at least 2 dimensions");
        const std::vector<int64_t> shape = {p.size(0), (rest + block_size - 1) / block_size};
        const auto sizes = scales[j].sizes();
        check_dtype(kOp, at("scales", j).c_str(), scales[j], ScalarType::Float);
        STD_TORCH_CHECK(std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end()) && scales[j].is_contiguous(),
                        kOp, ": expected scales[", j, "] to be contiguous of shape ", shape_name(shape), ", got ",
                        shape_name(sizes));
        x.scale[s] = static_cast<float*>(address(at("scales", j), scales[j], i, p, true));
      } else {
        check_kind(at("states", j), states[j], wide ? state == Kind::f64 : state == Kind::f32 || state == Kind::bf16,
                   wide ? "float64" : "float32 or bfloat16");
      }
      if (i == 0) args.state_kind[s] = state;
      STD_TORCH_CHECK(state == args.state_kind[s], kOp, ": expected states[", j, "] to have the dtype of states[",
                      j - i, "]");
      x.state[s] = address(at("states", j), states[j], i, p, true);
      vector = vector && on_sixteen(x.state[s]);
    }
    x.index = static_cast<int32_t>(i);
    x.stream = static_cast<uint32_t>(place.empty() ? i : place[3 * i]);
    x.start = place.empty() ? 0 : place[3 * i + 1];
    x.row_stride = place.empty() ? rest : place[3 * i + 2];
    // Rows matter to codes and to a shard whose rows do not follow each other.
    const bool by_rows = p.dim() > 1 && (codes || x.row_stride != rest);
    x.rows = by_rows ? p.size(0) : 1;
    x.columns = by_rows ? rest : p.numel();
    x.vector = vector && (x.rows == 1 || x.columns % 16 == 0) && (!codes || block_size % 16 == 0);
  }

  const Tensor coefficients = empty_cuda({static_cast<int64_t>(n), kCoefficients}, ScalarType::Double, like);
  args.coefficients = static_cast<double*>(coefficients.mutable_data_ptr());
  void* stream = current_stream(like);
  for (size_t first = 0; first < n; first += kTensorsPerLaunch) {
    args.count = static_cast<int32_t>(std::min<size_t>(kTensorsPerLaunch, n - first));
    std::copy_n(tensors.begin() + static_cast<std::ptrdiff_t>(first), args.count, args.tensor);
    check_launch(kOp, optimizer_update(args, stream));
  }
  if (host_steps) {
    for (const Tensor& step : steps) {
      if (!step.is_cuda()) *static_cast<float*>(step.mutable_data_ptr()) += 1.0f;
    }
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykernels, CUDA, m) { m.impl("optimizer_update_", TORCH_BOX(&optimizer_update_cuda)); }

}  // namespace pykernels::cuda
