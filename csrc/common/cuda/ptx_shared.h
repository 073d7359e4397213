// Shared memory by its 32-bit address, as the PTX wrappers take it.
#pragma once
#include "common/cuda/platform.h"
#ifndef __CUDACC__
#include "emulator/shared_memory.h"
#endif

namespace fastlm::ptx {

FASTLM_DEVICE uint32_t shared_address(const void* p FASTLM_AND_SITE) {
#ifdef __CUDACC__
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
#else
  return emulator::shared_address(p, site);
#endif
}

}  // namespace fastlm::ptx
