// pykernels._host: how the compiled libraries were built, what this CPU can do, the planner's search, and how a product
// is spread over a GPU. No torch in it, and no tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <vector>

#include "build_info.h"  // written by setup.py
#include "cuda/hopper/choose.h"
#include "placement.h"

namespace py = pybind11;

namespace {

#if defined(__clang__)
constexpr const char* kCompiler = "clang " __clang_version__;
#else
constexpr const char* kCompiler = "gcc " __VERSION__;
#endif

py::dict build_info() {
  py::dict info;
  info["compiler"] = kCompiler;
  info["cxx_standard"] = static_cast<long>(__cplusplus);
  info["cxx_flags"] = PYKERNELS_CXXFLAGS;
  info["torch"] = PYKERNELS_TORCH;
  info["cuda_archs"] = PYKERNELS_CUDA_ARCHS;
  info["hopper"] = PYKERNELS_HOPPER;
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

namespace hopper = pykernels::cuda::hopper;

std::vector<py::dict> int8_schedules() {
  std::vector<py::dict> found;
  for (int i = 0; i < hopper::kSchedules; ++i) {
    const hopper::Shape s = hopper::shape_of(static_cast<hopper::Schedule>(i));
    py::dict schedule;
    schedule["name"] = s.name;
    schedule["tile"] = py::make_tuple(s.m, s.n, s.k);
    schedule["cluster"] = py::make_tuple(s.cluster_m, s.cluster_n);
    schedule["pingpong"] = s.pingpong;
    schedule["stream_k"] = s.stream_k;
    found.push_back(schedule);
  }
  return found;
}

int choose_int8_schedule(int64_t m, int64_t n, int64_t k, int64_t sm_count, int64_t out_bytes) {
  return static_cast<int>(hopper::choose(m, n, k, sm_count, out_bytes));
}

py::dict int8_spread(int index, int64_t m, int64_t n, int64_t k, int64_t sm_count, int64_t out_bytes) {
  const auto schedule = static_cast<hopper::Schedule>(index);
  const hopper::Shape shape = hopper::shape_of(schedule);
  py::dict found;
  found["legal"] = hopper::is_legal(schedule, m, n, k, sm_count, out_bytes);
  if (shape.m == 0 || sm_count < shape.cluster_m * shape.cluster_n) return found;
  const hopper::Spread s = hopper::spread(shape, m, n, k, sm_count, out_bytes);
  found["tiles"] = s.tiles;
  found["units"] = s.units;
  found["steps"] = s.steps;
  found["makespan"] = s.makespan;
  found["cycles"] = s.cycles;
  return found;
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
  m.def("int8_schedules", &int8_schedules, "The kernels that int8_matmul has on sm_90, in the order of their numbers.");
  m.def("choose_int8_schedule", &choose_int8_schedule, "The number of the kernel that a product gets on sm_90.",
        py::arg("m"), py::arg("n"), py::arg("k"), py::arg("sm_count"), py::arg("out_bytes"));
  m.def("int8_spread", &int8_spread, "How a kernel would spread a product over the SMs.", py::arg("schedule"),
        py::arg("m"), py::arg("n"), py::arg("k"), py::arg("sm_count"), py::arg("out_bytes"));
}
