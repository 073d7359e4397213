// Instructions that the lanes of a warp execute together. Each lane that arrives waits; the last one does the work for all.
#pragma once
#include <cstdint>
#include <functional>

#include "emulator/site.h"

namespace fastlm::emulator {

struct Thread;

struct Rendezvous {
  const char* instruction;
  Site site;
  uint32_t mask;  // the lanes that take part
  uint32_t arrived;
  void* arguments[32];  // of each lane; null where it takes no part
  Thread* threads[32];
};

constexpr uint32_t kAllLanes = 0xffffffffu;

// Waits for the lanes in `mask`; then `work` runs once, with every lane's argument.
void with_warp(const char* instruction, uint32_t mask, void* argument, Site site,
               const std::function<void(void* const (&arguments)[32])>& work);

bool elect_one(Site site);  // true in one lane of the warp

}  // namespace fastlm::emulator
