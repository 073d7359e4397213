// Warp specialisation (sm_90): registers moved between warpgroups, and one thread elected from a warp.
#pragma once
#include "common/cuda/platform.h"
#ifndef __CUDACC__
#include "emulator/registers.h"
#include "emulator/warp.h"
#endif

namespace fastlm::ptx {

// Every warp of the warpgroup executes it. The registers that are given up are for setmaxnreg_increase of other warpgroups.
template <int kRegisters>
FASTLM_DEVICE void setmaxnreg_decrease(FASTLM_SITE) {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256, "a multiple of 8 from 24 to 256");
#ifdef __CUDACC__
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
#else
  emulator::setmaxnreg_decrease(kRegisters, site);
#endif
}

// Waits until the block has so many registers free.
template <int kRegisters>
FASTLM_DEVICE void setmaxnreg_increase(FASTLM_SITE) {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256, "a multiple of 8 from 24 to 256");
#ifdef __CUDACC__
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
#else
  emulator::setmaxnreg_increase(kRegisters, site);
#endif
}

// True in one lane of the warp; which one is not specified.
FASTLM_DEVICE bool elect_one(FASTLM_SITE) {
#ifdef __CUDACC__
  uint32_t elected;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(elected));
  return elected != 0;
#else
  return emulator::elect_one(site);
#endif
}

}  // namespace fastlm::ptx
