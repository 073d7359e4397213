// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011) for one counter, as
// in fastlm/ops/philox.py.
#pragma once
#include "common/cuda/platform.h"

namespace fastlm::cuda {

struct PhiloxKey {
  uint32_t low, high;
};

FASTLM_DEVICE void philox(uint32_t (&c)[4], PhiloxKey key) {
#pragma unroll
  for (int round = 0; round < 10; round++) {
    const uint32_t even_high = __umulhi(0xD2511F53u, c[0]), even_low = 0xD2511F53u * c[0];
    const uint32_t odd_high = __umulhi(0xCD9E8D57u, c[2]), odd_low = 0xCD9E8D57u * c[2];
    c[0] = odd_high ^ c[1] ^ key.low;
    c[1] = odd_low;
    c[2] = even_high ^ c[3] ^ key.high;
    c[3] = even_low;
    key.low += 0x9E3779B9u;
    key.high += 0xBB67AE85u;
  }
}

}  // namespace fastlm::cuda
