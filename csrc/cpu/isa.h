// Which instruction set the CPU kernels use, decided once at run time and switchable by tests.
#pragma once

namespace pykernels::cpu {

enum class Isa : int { portable = 0, avx2 = 1, avx512_vnni = 2 };

// The best set this machine has, capped by PYKERNELS_CPU_ISA=portable|avx2|avx512_vnni when that is set.
Isa isa();

}  // namespace pykernels::cpu

extern "C" {
// Forces a set (0, 1, 2) or returns to detection (-1); returns the set now in force, or -2 when the machine lacks it.
__attribute__((visibility("default"))) int pykernels_set_cpu_isa(int wanted);
__attribute__((visibility("default"))) int pykernels_get_cpu_isa();
}
