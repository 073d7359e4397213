// The memory model between threads: fences, atomics and polling. For ThreadSanitizer, a fence followed by an atomic
// write publishes what the thread did before the fence; an atomic read followed by a fence takes it over.
#pragma once
#include <cstdint>
#include <vector>

#include "emulator/site.h"

namespace fastlm::emulator {

struct Fences {
  bool armed = false;              // a fence since the thread began: its atomic writes publish
  std::vector<const void*> read;   // what it read atomically since its last fence
};

// ld.acquire and st.release in one: the load polls, so it may be called in a loop that waits for another block.
uint32_t load_acquire(const uint32_t* p, Site site);
uint32_t load_relaxed(const uint32_t* p, Site site);
void store_release(uint32_t* p, uint32_t value, Site site);
void store_relaxed(uint32_t* p, uint32_t value, Site site);
uint32_t add_release(uint32_t* p, uint32_t value, Site site);

}  // namespace fastlm::emulator
