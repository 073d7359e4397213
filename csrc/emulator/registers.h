// setmaxnreg: warps give registers back to the block's pool, and others take them from it.
#pragma once
#include <vector>

#include "emulator/site.h"

namespace fastlm::emulator {

struct Thread;

// A block starts with all registers of the SM shared out evenly, as a kernel with __launch_bounds__(threads, 1) does.
constexpr int kRegistersOfSm = 65536;
constexpr int initial_registers(int threads) {
  const int each = kRegistersOfSm / ((threads + 31) / 32 * 32) / 8 * 8;
  return each > 256 ? 256 : each;
}

struct RegisterPool {
  int free = 0;
  std::vector<Thread*> waiting;
};

void setmaxnreg_decrease(int registers, Site site);
void setmaxnreg_increase(int registers, Site site);  // waits until the pool has enough

}  // namespace fastlm::emulator
