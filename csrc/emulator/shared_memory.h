// A block's shared memory: an arena with a few allocations in it, addressed as on the GPU by 32-bit offsets.
//
// Every byte is 0xff until it is written: NaN as float32, float16 or bfloat16, and -1 as an integer, so what is read
// before it was written shows in the result. Around and between the allocations lie guard bytes, checked at the end.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace fastlm::emulator {

constexpr unsigned char kPoison = 0xff;
constexpr size_t kArena = 256 * 1024;
constexpr size_t kSharedBase = 1024;        // the first allocation's offset: address 0 is never valid
constexpr size_t kSharedLimit = 227 * 1024;  // of a block on sm_90
constexpr size_t kGuard = 256;              // bytes between two allocations

struct SharedMemory {
  struct Allocation {
    size_t offset, bytes;
    const void* tag;  // which FASTLM_SHARED; null: the dynamic one
  };
  unsigned char* data = nullptr;
  // What TMA and wgmma see: they read through another path (the async proxy), to which a thread's ordinary writes are
  // invisible until fence.proxy.async.
  unsigned char* async_view = nullptr;
  size_t top = 0;
  std::vector<Allocation> allocations;

  void reset(size_t dynamic_bytes);
  void retire();
  size_t allocate(size_t bytes, size_t alignment, const void* tag);
  bool holds(const void* p) const;
  bool inside_allocation(uint32_t address, size_t bytes) const;
  // A message where a guard byte was overwritten, else empty.
  std::string overwritten() const;
};

}  // namespace fastlm::emulator
