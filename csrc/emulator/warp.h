// Instructions that the lanes of a warp execute together. Each lane that arrives waits; the last one does the work for all.
#pragma once
#include <cstdint>

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
using LaneArguments = void* const[32];

// A reference to what is done for the warp; std::function would allocate at every instruction of every lane.
class WarpWork {
 public:
  template <class F>
  WarpWork(const F& work)  // NOLINT: implicit, so that a lambda can be passed
      : object_(&work), call_([](const void* object, const LaneArguments& lanes) { (*static_cast<const F*>(object))(lanes); }) {}
  void operator()(const LaneArguments& lanes) const { call_(object_, lanes); }

 private:
  const void* object_;
  void (*call_)(const void*, const LaneArguments&);
};

// Waits for the lanes in `mask`; then `work` runs once, with every lane's argument.
void with_warp(const char* instruction, uint32_t mask, void* argument, Site site, const WarpWork& work);

bool elect_one(Site site);  // true in one lane of the warp

}  // namespace fastlm::emulator
