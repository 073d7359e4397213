// Programmatic dependent launch (sm_90): a kernel that begins while the one in front of it is still running.
#pragma once
#include "common/cuda/platform.h"
#ifndef __CUDACC__
#include "emulator/grid_dependency.h"
#endif

namespace fastlm::ptx {

// Waits until the kernel in front has ended and its writes are visible.
FASTLM_DEVICE void grid_dependency_wait(FASTLM_SITE) {
#ifdef __CUDACC__
  asm volatile("griddepcontrol.wait;" ::: "memory");
#else
  emulator::griddepcontrol_wait(site);
#endif
}

// Lets the next kernel begin, once every block has said so or ended.
FASTLM_DEVICE void grid_launch_dependents(FASTLM_SITE) {
#ifdef __CUDACC__
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#else
  emulator::griddepcontrol_launch_dependents(site);
#endif
}

}  // namespace fastlm::ptx
