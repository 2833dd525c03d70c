// pykernels._host: how the compiled libraries were built, and what this CPU can do. No torch in it, and no tensors.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <string>

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

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Build information and CPU features, without torch.";
  m.def("build_info", &build_info, "Compiler, flags, torch version and CUDA architectures of the build.");
  m.def("cpu_features", &cpu_features, "Whether this CPU has each instruction set that the kernels ask for.");
}
