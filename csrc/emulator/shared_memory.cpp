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

void SharedMemory::reset(size_t dynamic_bytes, bool opted_in) {
  limit = opted_in ? kSharedLimit : kSharedWithoutOptIn;
  if (data == nullptr) data = new_arena();
  if (async_view == nullptr) async_view = new_arena();
  // What the last block used of the arena, or may have overwritten without permission.
  const size_t used = std::max(top, kSharedBase + dynamic_bytes);
  forbid(data, kArena);
  poisoned = 0;
  poison(used);
  allocations.clear();
  top = kSharedBase - kGuard;
  if (dynamic_bytes > 0) allocate(dynamic_bytes, 1024, nullptr);
}

// Up to `end` and a while beyond, where a write outside would show.
void SharedMemory::poison(size_t end) {
  end = std::min(kArena, end + 8192);
  if (end <= poisoned) return;
  fill_quietly(data + poisoned, kPoison, end - poisoned);
  fill_quietly(async_view + poisoned, kPoison, end - poisoned);
  poisoned = end;
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
  poison(top);
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
  if (total > shared.limit) {
    fail(site, "%zu bytes of shared memory; a block has at most %zu%s", total, shared.limit,
         shared.limit == kSharedWithoutOptIn ? " unless its launch opts in to more" : "");
  }
  return shared.data + shared.allocate(bytes, alignment, tag);
}

uint32_t shared_address(const void* p, Site site) {
  const SharedMemory& shared = current->block->shared;
  if (!shared.holds(p)) fail(site, "the address of %p as shared memory: it is not in the block's shared memory", p);
  return static_cast<uint32_t>(static_cast<const unsigned char*>(p) - shared.data);
}

SharedPlace shared_place(uint32_t address, size_t bytes, size_t alignment, const char* instruction, Site site) {
  Block* block = current->block;
  const uint32_t rank = address >> kRankShift, offset = address & ((1u << kRankShift) - 1);
  if (rank > 0) {
    if (rank > block->cluster->blocks.size()) fail(site, "%s: 0x%x is no shared address of this cluster", instruction, address);
    block = block->cluster->blocks[rank - 1].get();
    if (block != current->block && block->cluster->barrier.completed == 0) {
      fail(site, "%s: another block's shared memory before the first cluster barrier: that block may not have started", instruction);
    }
    if (block->live == 0) fail(site, "%s: shared memory of block %u of the cluster, which has exited", instruction, rank - 1);
  }
  if (offset % alignment != 0) {
    fail(site, "%s: the shared address 0x%x is not aligned to %zu bytes", instruction, offset, alignment);
  }
  if (!block->shared.inside_allocation(offset, bytes)) {
    fail(site, "%s: the shared addresses 0x%x to 0x%zx are outside every allocation", instruction, offset, offset + bytes);
  }
  return {block, offset, block->shared.data + offset};
}

}  // namespace fastlm::emulator
