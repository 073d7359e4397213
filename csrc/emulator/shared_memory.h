// A block's shared memory: an arena with a few allocations in it, addressed as on the GPU by 32-bit offsets.
//
// Every byte is 0xff until it is written: NaN as float32, float16 or bfloat16, and -1 as an integer, so what is read
// before it was written shows in the result. Around and between the allocations lie guard bytes, checked at the end.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "emulator/site.h"

namespace fastlm::emulator {

struct Block;

constexpr unsigned char kPoison = 0xff;
constexpr size_t kArena = 256 * 1024;
constexpr size_t kSharedBase = 1024;        // the first allocation's offset: address 0 is never valid
constexpr size_t kSharedLimit = 227 * 1024;  // of a block on sm_90
constexpr size_t kSharedWithoutOptIn = 48 * 1024;
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
  size_t poisoned = 0;  // bytes from the start that hold kPoison until they are written
  size_t top = 0;
  std::vector<Allocation> allocations;
  size_t limit = 0;  // of all allocations together

  void reset(size_t dynamic_bytes, bool opted_in);
  void retire();
  void poison(size_t end);
  size_t allocate(size_t bytes, size_t alignment, const void* tag);
  bool holds(const void* p) const;
  bool inside_allocation(uint32_t address, size_t bytes) const;
  // A message where a guard byte was overwritten, else empty.
  std::string overwritten() const;
};

// A pointer into the current block's shared memory as a 32-bit shared address.
uint32_t shared_address(const void* p, Site site);

// A shared address of an instruction: the block that it is in, and the bytes there. An address in another block of the
// cluster (shared::cluster) has that block's rank + 1 in its top byte. Fails where it is misaligned or outside every allocation.
struct SharedPlace {
  Block* block;
  uint32_t offset;
  unsigned char* data;
};
SharedPlace shared_place(uint32_t address, size_t bytes, size_t alignment, const char* instruction, Site site);
constexpr int kRankShift = 24;

}  // namespace fastlm::emulator
