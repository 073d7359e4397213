#include "emulator/shared_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <stdexcept>

#include "emulator/cuda.h"
#include "emulator/sanitizer.h"
#include "emulator/scheduler.h"

namespace fastlm::emulator {
namespace {

unsigned char* new_arena() {
  void* p = mmap(nullptr, kArena, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) throw std::runtime_error("the CUDA emulator: no memory for a block's shared memory");
  return static_cast<unsigned char*>(p);
}

}  // namespace

void SharedMemory::reset(size_t dynamic_bytes) {
  if (data == nullptr) data = new_arena();
  if (async_view == nullptr) async_view = new_arena();
  // What the last block used of the arena, or may have overwritten without permission.
  const size_t used = std::min(kArena, std::max(top, kSharedBase + dynamic_bytes) + 8192);
  forbid(data, kArena);
  fill_quietly(data, kPoison, used);
  fill_quietly(async_view, kPoison, used);
  allocations.clear();
  top = kSharedBase - kGuard;
  if (dynamic_bytes > 0) allocate(dynamic_bytes, 1024, nullptr);
}

void SharedMemory::retire() {
  allow(data, kArena);
  // For ThreadSanitizer a block needs memory that no other block has used, or it reports races between the two.
  if (tsan()) {
    munmap(data, kArena);
    data = nullptr;
  }
}

size_t SharedMemory::allocate(size_t bytes, size_t alignment, const void* tag) {
  alignment = std::max<size_t>(alignment, 16);
  const size_t offset = (top + kGuard + alignment - 1) / alignment * alignment;
  top = offset + bytes;
  allocations.push_back({offset, bytes, tag});
  allow(data + offset, bytes);
  return offset;
}

bool SharedMemory::holds(const void* p) const {
  return p >= data && p < data + kArena;
}

bool SharedMemory::inside_allocation(uint32_t address, size_t bytes) const {
  for (const Allocation& a : allocations) {
    if (address >= a.offset && address + bytes <= a.offset + a.bytes) return true;
  }
  return false;
}

std::string SharedMemory::overwritten() const {
  if (asan()) return "";  // it has reported the write itself
  std::vector<Allocation> in_order = allocations;
  std::sort(in_order.begin(), in_order.end(), [](const Allocation& a, const Allocation& b) { return a.offset < b.offset; });
  in_order.push_back({std::min(kArena, top + 4096), 0, nullptr});
  size_t guard = kSharedBase - kGuard;
  for (const Allocation& a : in_order) {
    for (; guard < a.offset; guard++) {
      if (data[guard] != kPoison) {
        return "a write outside the block's shared memory, at offset " +
               std::to_string(static_cast<int64_t>(guard) - static_cast<int64_t>(kSharedBase));
      }
    }
    guard = a.offset + a.bytes;
  }
  return "";
}

void* dynamic_shared(size_t alignment, Site site) {
  Ignored ignored;
  if (alignment > 1024) fail(site, "dynamic shared memory aligned to %zu bytes; the GPU guarantees no more than 1024", alignment);
  return current->block->shared.data + kSharedBase;
}

void* static_shared(const void* tag, size_t bytes, size_t alignment, Site site) {
  Ignored ignored;
  SharedMemory& shared = current->block->shared;
  for (const SharedMemory::Allocation& a : shared.allocations) {
    if (a.tag == tag) return shared.data + a.offset;
  }
  size_t total = bytes;
  for (const SharedMemory::Allocation& a : shared.allocations) total += a.bytes;
  if (total > kSharedLimit) fail(site, "%zu bytes of shared memory; a block has at most %zu", total, kSharedLimit);
  return shared.data + shared.allocate(bytes, alignment, tag);
}

}  // namespace fastlm::emulator
