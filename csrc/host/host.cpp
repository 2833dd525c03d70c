// pykernels._host: how the compiled libraries were built, what this CPU can do, and the planner's search. No torch in
// it, and no tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <tuple>

#include "placement.h"

namespace py = pybind11;

namespace {

#if defined(__clang__)
constexpr const char* kCompiler = "clang " __clang_version__;
#else
constexpr const char* kCompiler = "gcc " __VERSION__;
#endif

// Lists arrive joined by commas: a macro's value cannot hold spaces on every command line.
std::string spaced(std::string text) {
  std::replace(text.begin(), text.end(), ',', ' ');
  return text;
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = kCompiler;
  info["cxx_standard"] = static_cast<long>(__cplusplus);
  info["cxx_flags"] = spaced(PYKERNELS_CXXFLAGS);
  info["torch"] = PYKERNELS_TORCH;
  info["cuda_archs"] = spaced(PYKERNELS_CUDA_ARCHS);
  return info;
}

py::dict cpu_features() {
  py::dict features;
#if defined(__x86_64__)
  __builtin_cpu_init();
  features["avx2"] = __builtin_cpu_supports("avx2") != 0;
  features["fma"] = __builtin_cpu_supports("fma") != 0;
  features["f16c"] = __builtin_cpu_supports("f16c") != 0;
  features["avx512f"] = __builtin_cpu_supports("avx512f") != 0;
  features["avx512bw"] = __builtin_cpu_supports("avx512bw") != 0;
  features["avx512dq"] = __builtin_cpu_supports("avx512dq") != 0;
  features["avx512vl"] = __builtin_cpu_supports("avx512vl") != 0;
  features["avx512_vnni"] = __builtin_cpu_supports("avx512vnni") != 0;
  features["avx512_bf16"] = __builtin_cpu_supports("avx512bf16") != 0;
#endif
  return features;
}

using Option = std::tuple<int64_t, int64_t, int64_t, double>;

py::object place_layers(const std::vector<std::vector<Option>>& layers, const std::vector<int64_t>& gradients,
                        int64_t head, int64_t budget, int64_t unit) {
  std::vector<std::vector<pykernels::LayerOption>> options(layers.size());
  for (size_t i = 0; i < layers.size(); i++)
    for (const auto& [saved, forward, backward, cost] : layers[i])
      options[i].push_back({saved, forward, backward, cost});
  const auto found = pykernels::place_layers(options, gradients, head, budget, unit);
  if (!found) return py::none();
  return py::make_tuple(found->choices, found->saved, found->cost);
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Build information, CPU features and the planner's search, without torch.";
  m.def("build_info", &build_info, "Compiler, flags, torch version and CUDA architectures of the build.");
  m.def("place_layers", &place_layers, py::arg("layers"), py::arg("gradients"), py::arg("head"), py::arg("budget"),
        py::arg("unit") = 1,
        "(choices, saved bytes, cost) of the cheapest option for each layer within the budget, or None: placement.h.");
  m.def("cpu_features", &cpu_features, "Whether this CPU has each instruction set that the kernels ask for.");
}
