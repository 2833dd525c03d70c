#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace pykernels::cpu {
namespace {

Isa detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni"))
    return Isa::avx512_vnni;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    return Isa::avx2;
#endif
  return Isa::portable;
}

Isa initial() {
  const Isa best = detect();
  const char* env = std::getenv("PYKERNELS_CPU_ISA");
  if (env == nullptr) return best;
  const Isa asked = !std::strcmp(env, "portable") ? Isa::portable : !std::strcmp(env, "avx2") ? Isa::avx2 : best;
  return asked < best ? asked : best;
}

std::atomic<int>& state() {
  static std::atomic<int> value{static_cast<int>(initial())};
  return value;
}

}  // namespace

Isa isa() { return static_cast<Isa>(state().load(std::memory_order_relaxed)); }

}  // namespace pykernels::cpu

int pykernels_set_cpu_isa(int wanted) {
  using namespace pykernels::cpu;
  if (wanted < -1 || wanted > static_cast<int>(detect())) return -2;
  const int value = wanted == -1 ? static_cast<int>(initial()) : wanted;
  state().store(value, std::memory_order_relaxed);
  return value;
}

int pykernels_get_cpu_isa() { return static_cast<int>(pykernels::cpu::isa()); }
