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

// What counters of stream 0 share that have the same upper half: the keys of the rounds and the words that do not
// depend on the lower half. With p = M0 * lower and q = M1 * (hi(p) ^ k1[0]), the words after two rounds are hi(q) ^
// k0[1], lo(q), lo(p) ^ third, and one that enters as fourth = itself ^ k1[2].
struct PhiloxRounds {
  uint32_t k0[kPhiloxRounds], k1[kPhiloxRounds], third, fourth;

  PhiloxRounds(uint64_t seed, uint32_t upper) {
    k0[0] = static_cast<uint32_t>(seed), k1[0] = static_cast<uint32_t>(seed >> 32);
    for (int round = 1; round < kPhiloxRounds; ++round) {
      k0[round] = k0[round - 1] + kPhiloxW0;
      k1[round] = k1[round - 1] + kPhiloxW1;
    }
    const uint64_t p = static_cast<uint64_t>(kPhiloxM0) * (upper ^ k0[0]);
    third = static_cast<uint32_t>(p >> 32) ^ k1[1];
    fourth = static_cast<uint32_t>(p) ^ k1[2];
  }
};

}  // namespace pykernels::cpu
