#include "emulator/memory.h"

#include <algorithm>

#include "emulator/cuda.h"
#include "emulator/sanitizer.h"
#include "emulator/scheduler.h"

namespace fastlm::emulator {
namespace {

// Whatever the thread reads at `p` is ordered before what it does after its next fence.
void remember_read(const void* p) {
  auto& read = current->fences.read;
  if (tsan() && std::find(read.begin(), read.end(), p) == read.end()) read.push_back(p);
}

void check_address(const void* p, size_t bytes, const char* instruction, Site site) {
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0) fail(site, "%s at %p: not aligned to %zu bytes", instruction, p, bytes);
  if (out_of_bounds(p, bytes)) fail(site, "%s at %p: out of bounds", instruction, p);
}

}  // namespace

void thread_fence(Site site) {
  Ignored ignored;
  enter("__threadfence", site);
  for (const void* p : current->fences.read) acquire(p);
  current->fences.read.clear();
  current->fences.armed = true;
}

void before_atomic(const void* address, size_t bytes, Site site) {
  Ignored ignored;
  enter("an atomic operation", site);
  check_address(address, bytes, "an atomic operation", site);
  if (current->fences.armed) release(address);
}

void after_atomic(const void* address) {
  Ignored ignored;
  remember_read(address);
  note_progress();
}

void nanosleep(Site site) {
  Ignored ignored;
  enter("__nanosleep", site);
  poll();
}

uint32_t load_relaxed(const uint32_t* p, Site site) {
  Ignored ignored;
  enter("a relaxed load", site);
  check_address(p, 4, "a relaxed load", site);
  poll();
  remember_read(p);
  return __atomic_load_n(p, __ATOMIC_RELAXED);
}

uint32_t load_acquire(const uint32_t* p, Site site) {
  Ignored ignored;
  enter("ld.acquire", site);
  check_address(p, 4, "ld.acquire", site);
  poll();
  acquire(p);
  return __atomic_load_n(p, __ATOMIC_RELAXED);
}

void store_relaxed(uint32_t* p, uint32_t value, Site site) {
  Ignored ignored;
  enter("a relaxed store", site);
  check_address(p, 4, "a relaxed store", site);
  if (current->fences.armed) release(p);
  __atomic_store_n(p, value, __ATOMIC_RELAXED);
  note_progress();
}

void store_release(uint32_t* p, uint32_t value, Site site) {
  Ignored ignored;
  enter("st.release", site);
  check_address(p, 4, "st.release", site);
  release(p);
  __atomic_store_n(p, value, __ATOMIC_RELAXED);
  note_progress();
}

uint32_t add_release(uint32_t* p, uint32_t value, Site site) {
  Ignored ignored;
  enter("red.release", site);
  check_address(p, 4, "red.release", site);
  release(p);
  const uint32_t old = __atomic_fetch_add(p, value, __ATOMIC_RELAXED);
  note_progress();
  return old;
}

}  // namespace fastlm::emulator
