// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011), as in
// fastlm/ops/philox.py, for Vec::size counters at a time. Plain loops over lanes, which the compiler makes vectors of.
#pragma once
#include "common/simd.h"

namespace fastlm::FASTLM_ISA {

struct PhiloxKey {
  uint32_t low, high;
};

struct PhiloxWords {
  uint32_t word[4][Vec::size];
};

// counters: 0 and 2 differ from lane to lane, 1 and 3 are the same in all.
inline PhiloxWords philox(const uint32_t* counter0, uint32_t counter1, const uint32_t* counter2, uint32_t counter3,
                          PhiloxKey key) {
  constexpr int size = Vec::size;
  PhiloxWords c;
  for (int i = 0; i < size; ++i) {
    c.word[0][i] = counter0[i];
    c.word[1][i] = counter1;
    c.word[2][i] = counter2[i];
    c.word[3][i] = counter3;
  }
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < size; ++i) {
      const uint64_t even = uint64_t{0xD2511F53u} * c.word[0][i], odd = uint64_t{0xCD9E8D57u} * c.word[2][i];
      const uint32_t w1 = c.word[1][i], w3 = c.word[3][i];
      c.word[0][i] = static_cast<uint32_t>(odd >> 32) ^ w1 ^ key.low;
      c.word[1][i] = static_cast<uint32_t>(odd);
      c.word[2][i] = static_cast<uint32_t>(even >> 32) ^ w3 ^ key.high;
      c.word[3][i] = static_cast<uint32_t>(even);
    }
    key.low += 0x9E3779B9u;
    key.high += 0xBB67AE85u;
  }
  return c;
}

}  // namespace fastlm::FASTLM_ISA
