// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
// Element i of a tensor takes word i & 3 of the counter (lo32(i >> 2), hi32(i >> 2), stream, step) under the key
// (lo32(seed), hi32(seed)), so its number depends on nothing but the seed and its own index.
#pragma once

#include <cstdint>

namespace pykernels::cpu {

inline constexpr uint32_t kPhiloxM0 = 0xD2511F53u;
inline constexpr uint32_t kPhiloxM1 = 0xCD9E8D57u;
inline constexpr uint32_t kPhiloxW0 = 0x9E3779B9u;
inline constexpr uint32_t kPhiloxW1 = 0xBB67AE85u;
inline constexpr int kPhiloxRounds = 10;

// The top 24 bits as a float in [0, 1).
inline constexpr float kUniformStep = 0x1p-24f;

struct PhiloxKey {
  uint64_t seed;
  uint32_t stream;
  uint32_t step = 0;
};

// The four words of one counter.
inline void philox4x32(uint64_t counter, PhiloxKey key, uint32_t (&word)[4]) {
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32), c2 = key.stream,
           c3 = key.step;
  uint32_t k0 = static_cast<uint32_t>(key.seed), k1 = static_cast<uint32_t>(key.seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(kPhiloxM0) * c0;
    const uint64_t p1 = static_cast<uint64_t>(kPhiloxM1) * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  word[0] = c0, word[1] = c1, word[2] = c2, word[3] = c3;
}

}  // namespace pykernels::cpu
