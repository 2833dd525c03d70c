#include "ceiling.h"

#include <cstring>

#include "isa.h"

namespace {

volatile int32_t sink;

int64_t int8_portable(int64_t iterations) {
  constexpr int kLanes = 256;
  int8_t a[kLanes], b[kLanes];
  int32_t acc[kLanes] = {};
  std::memset(a, 3, sizeof(a));
  std::memset(b, 5, sizeof(b));
  for (int64_t i = 0; i < iterations; ++i) {
    asm volatile("" : : "r"(a), "r"(b) : "memory");  // the operands may have changed: no product is hoisted
    for (int j = 0; j < kLanes; ++j) acc[j] += static_cast<int32_t>(a[j]) * b[j];
  }
  int32_t total = 0;
  for (int32_t v : acc) total ^= v;
  sink = total;
  return iterations * kLanes * 2;
}

int64_t float32_portable(int64_t iterations) {
  constexpr int kLanes = 64;
  float acc[kLanes];
  for (int j = 0; j < kLanes; ++j) acc[j] = static_cast<float>(j);
  float a = 0.5f, b = 0.25f;
  for (int64_t i = 0; i < iterations; ++i) {
    asm volatile("" : "+m"(a), "+m"(b));
    for (int j = 0; j < kLanes; ++j) acc[j] = acc[j] * a + b;
  }
  float total = 0;
  for (float v : acc) total += v;
  sink = static_cast<int32_t>(total);
  return iterations * kLanes * 2;
}

uint64_t read_portable(const void* data, int64_t bytes) {
  const char* p = static_cast<const char*>(data);
  uint64_t acc[8] = {};
  int64_t i = 0;
  for (; i + 64 <= bytes; i += 64) {
    uint64_t line[8];
    std::memcpy(line, p + i, sizeof(line));
    for (int j = 0; j < 8; ++j) acc[j] ^= line[j];
  }
  for (; i < bytes; ++i) acc[0] ^= static_cast<unsigned char>(p[i]);
  uint64_t total = 0;
  for (uint64_t v : acc) total ^= v;
  return total;
}

// The lines of an array that belong to piece `index` of `pieces`.
struct Lines {
  int64_t begin, end;

  Lines(int64_t bytes, int64_t index, int64_t pieces)
      : begin(bytes / 64 * index / pieces * 64), end(bytes / 64 * (index + 1) / pieces * 64) {}
};

}  // namespace

int64_t pykernels_ceiling_int8(int64_t iterations) {
#if defined(__x86_64__)
  using pykernels::cpu::Isa;
  if (pykernels::cpu::isa() == Isa::avx512_vnni) return pykernels::cpu::ceiling_int8_avx512(iterations);
  if (pykernels::cpu::isa() == Isa::avx2) return pykernels::cpu::ceiling_int8_avx2(iterations);
#endif
  return int8_portable(iterations);
}

const char* pykernels_ceiling_int8_name() {
#if defined(__x86_64__)
  using pykernels::cpu::Isa;
  if (pykernels::cpu::isa() == Isa::avx512_vnni) return "vpdpbusd zmm";
  if (pykernels::cpu::isa() == Isa::avx2) return "vpmaddwd ymm";
#endif
  return "portable int8";
}

int64_t pykernels_ceiling_float32(int64_t iterations) {
#if defined(__x86_64__)
  using pykernels::cpu::Isa;
  if (pykernels::cpu::isa() == Isa::avx512_vnni) return pykernels::cpu::ceiling_float32_avx512(iterations);
  if (pykernels::cpu::isa() == Isa::avx2) return pykernels::cpu::ceiling_float32_avx2(iterations);
#endif
  return float32_portable(iterations);
}

const char* pykernels_ceiling_float32_name() {
#if defined(__x86_64__)
  using pykernels::cpu::Isa;
  if (pykernels::cpu::isa() == Isa::avx512_vnni) return "vfmadd zmm";
  if (pykernels::cpu::isa() == Isa::avx2) return "vfmadd ymm";
#endif
  return "portable float32";
}

uint64_t pykernels_ceiling_read(const void* data, int64_t bytes) {
#if defined(__x86_64__)
  using pykernels::cpu::Isa;
  if (pykernels::cpu::isa() == Isa::avx512_vnni) return pykernels::cpu::ceiling_read_avx512(data, bytes);
  if (pykernels::cpu::isa() == Isa::avx2) return pykernels::cpu::ceiling_read_avx2(data, bytes);
#endif
  return read_portable(data, bytes);
}

uint64_t pykernels_ceiling_update(void* const* updated, const int64_t* updated_bytes, int64_t updates,
                                  const void* const* read, const int64_t* read_bytes, int64_t reads) {
  using Line = uint64_t __attribute__((vector_size(64)));
  constexpr int64_t kPiece = 256;  // of the longest array; longer turns stop the prefetchers of the others
  int64_t longest = 0;
  for (int64_t j = 0; j < updates; ++j) longest = longest < updated_bytes[j] ? updated_bytes[j] : longest;
  for (int64_t j = 0; j < reads; ++j) longest = longest < read_bytes[j] ? read_bytes[j] : longest;
  const int64_t pieces = (longest + kPiece - 1) / kPiece;
  Line acc = {};
  for (int64_t index = 0; index < pieces; ++index) {
    for (int64_t j = 0; j < reads; ++j) {
      const Lines lines(read_bytes[j], index, pieces);
      for (int64_t i = lines.begin; i < lines.end; i += 64) {
        Line line;
        std::memcpy(&line, static_cast<const char*>(read[j]) + i, sizeof(line));
        acc ^= line;
      }
    }
    for (int64_t j = 0; j < updates; ++j) {
      const Lines lines(updated_bytes[j], index, pieces);
      for (int64_t i = lines.begin; i < lines.end; i += 64) {
        Line line;
        std::memcpy(&line, static_cast<char*>(updated[j]) + i, sizeof(line));
        line ^= acc;
        std::memcpy(static_cast<char*>(updated[j]) + i, &line, sizeof(line));
      }
    }
  }
  uint64_t total = 0;
  for (int k = 0; k < 8; ++k) total ^= acc[k];
  return total;
}
