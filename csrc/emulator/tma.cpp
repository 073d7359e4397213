#include "emulator/tma.h"

#include <algorithm>
#include <cstring>

#include "emulator/elements.h"
#include "emulator/mbarrier.h"
#include "emulator/sanitizer.h"
#include "emulator/scheduler.h"

namespace fastlm::emulator {
namespace {

constexpr uint32_t kPiece = 16;  // bytes that stay together under every swizzle

// One box of a tensor: its rows of 16-byte pieces, in the order in which they lie in shared memory.
struct Box {
  TensorMap map;
  int at[5];  // its first element's coordinates

  uint32_t bytes() const {
    uint32_t n = size_of(map.type);
    for (int d = 0; d < map.rank; d++) n *= map.box[d];
    return n;
  }
  // f(global address or null where out of bounds, offset in the box) for each element.
  template <class F>
  void for_each(F f) const {
    const uint32_t size = size_of(map.type), count = bytes() / size;
    for (uint32_t i = 0; i < count; i++) {
      uint32_t rest = i;
      bool inside = true;
      unsigned char* p = map.base;
      for (int d = 0; d < map.rank; d++) {
        const int64_t x = at[d] + static_cast<int64_t>(rest % map.box[d]);
        rest /= map.box[d];
        inside = inside && x >= 0 && x < static_cast<int64_t>(map.size[d]);
        p += x * static_cast<int64_t>(map.stride[d]);
      }
      f(inside ? p : nullptr, i * size);
    }
  }
};

Box box_of(const TensorMap* map, const int* coordinates, int rank, const char* instruction, Site site) {
  if (reinterpret_cast<uintptr_t>(map) % 64 != 0) fail(site, "%s: a tensor map must be 64-byte aligned", instruction);
  if (map->rank != rank) fail(site, "%s: %d coordinates for a tensor map of rank %d", instruction, rank, map->rank);
  Box box{*map, {}};
  std::copy_n(coordinates, rank, box.at);
  return box;
}

SharedPlace tile(uint32_t address, const Box& box, const char* instruction, Site site) {
  return shared_place(address, box.bytes(), swizzle_period(box.map.swizzle), instruction, site);
}

void poison(const SharedPlace& place, size_t bytes) {
  kernel_writes(place.data, bytes);
  fill_quietly(place.data, kPoison, bytes);
  fill_quietly(place.block->shared.async_view + place.offset, kPoison, bytes);
}

void write_both_views(SharedMemory& shared, uint32_t offset, const void* from, size_t bytes) {
  std::memcpy(shared.data + offset, from, bytes);
  std::memcpy(shared.async_view + offset, from, bytes);
}

// The blocks that a copy goes to, with its destination in each.
std::vector<SharedPlace> destinations(uint32_t to, uint32_t mbarrier, uint16_t blocks, size_t bytes, size_t alignment,
                                      const char* instruction, Site site) {
  const SharedPlace own = shared_place(to, bytes, alignment, instruction, site);
  if (blocks == 0) {
    check_mbarrier(mbarrier, site);
    return {own};
  }
  std::vector<SharedPlace> all;
  for (uint32_t rank = 0; rank < 16; rank++) {
    if ((blocks >> rank & 1) == 0) continue;
    const uint32_t peer = (rank + 1) << kRankShift, in_peer = (1u << kRankShift) - 1;
    all.push_back(shared_place(peer | (to & in_peer), bytes, alignment, instruction, site));
    check_mbarrier(peer | (mbarrier & in_peer), site);
  }
  return all;
}

template <class Land>
void defer_load(const std::vector<SharedPlace>& places, uint32_t mbarrier, uint16_t blocks, uint32_t bytes, Site site, Land land) {
  const uint32_t barrier = mbarrier & ((1u << kRankShift) - 1);
  Block* barrier_block = shared_place(mbarrier, 8, 8, "an asynchronous copy's mbarrier", site).block;
  const bool multicast = blocks != 0;
  for (const SharedPlace& p : places) {
    poison(p, bytes);
    defer(p.block, site, [=] {  // the copies of a multicast land one by one
      kernel_writes(p.data, bytes);
      land(p);
      mbarrier_complete_tx(multicast ? *p.block : *barrier_block, barrier, bytes, site);
    });
  }
}

}  // namespace

// A store reads shared memory and writes global memory at some time between its issue and the wait for it.
struct BulkStore {
  Block* block;
  uint32_t from;
  uint32_t bytes;
  Swizzle swizzle;
  BulkReduction reduction;
  ElementType type;
  std::function<void(const std::function<void(unsigned char*, uint32_t)>&)> elements;  // (global address, offset)
  Site site;
  std::vector<unsigned char> read;  // what it has read from shared memory
  bool was_read = false, was_written = false;

  void read_shared() {
    if (was_read) return;
    was_read = true;
    acquire(this);
    kernel_reads(block->shared.data + from, bytes);
    release(this);
    if (std::memcmp(block->shared.data + from, block->shared.async_view + from, bytes) != 0) {
      fail(site, "a bulk store read shared memory that ordinary stores have written, with no fence.proxy.async between "
                 "them, or before the store was waited for");
    }
    read.assign(block->shared.async_view + from, block->shared.async_view + from + bytes);
    release(this);
  }
  void write_global() {
    read_shared();
    if (was_written) return;
    was_written = true;
    const size_t size = size_of(type);
    elements([&](unsigned char* to, uint32_t offset) {
      const unsigned char* value = &read[swizzled(from + offset, swizzle) - from];
      if (reduction == BulkReduction::none) kernel_writes(to, size);  // a reduction is atomic
      if (out_of_bounds(to, size)) fail(site, "a bulk store out of bounds");
      if (reduction == BulkReduction::none) std::memcpy(to, value, size);
      else combine(reduction, type, to, value);
    });
    release(this);
    note_progress();
  }
};

namespace {

void start(BulkStore store) {
  current->bulk.open.push_back(std::make_shared<BulkStore>(std::move(store)));
}

}  // namespace

void tma_load(uint32_t to, const TensorMap* map, uint32_t mbarrier, const int* coordinates, int rank, uint16_t blocks, Site site) {
  Ignored ignored;
  const char* instruction = "a TMA load";
  enter(instruction, site);
  const Box box = box_of(map, coordinates, rank, instruction, site);
  tile(to, box, instruction, site);
  const auto places = destinations(to, mbarrier, blocks, box.bytes(), swizzle_period(map->swizzle), instruction, site);
  defer_load(places, mbarrier, blocks, box.bytes(), site, [box, site](const SharedPlace& p) {
    unsigned char fill[8] = {};
    for (size_t i = 0; box.map.fill_nan && i < sizeof fill; i++) fill[i] = i % 2 == 0 ? 0xf7 : 0x7f;  // an H200's NaN
    const size_t size = size_of(box.map.type);
    box.for_each([&](const unsigned char* from, uint32_t offset) {
      if (from != nullptr && out_of_bounds(from, size)) fail(site, "a TMA load out of bounds: the tensor map is wrong");
      if (from != nullptr) kernel_reads(from, size);
      const uint32_t address = swizzled(p.offset + offset, box.map.swizzle);
      write_both_views(p.block->shared, address, from != nullptr ? from : fill, size);
    });
  });
}

void tma_store(const TensorMap* map, uint32_t from, const int* coordinates, int rank, BulkReduction reduction, Site site) {
  Ignored ignored;
  const char* instruction = reduction == BulkReduction::none ? "a TMA store" : "a TMA reduction";
  enter(instruction, site);
  const Box box = box_of(map, coordinates, rank, instruction, site);
  for (int d = 0; d < rank; d++) {  // as an H200 has it; loads may begin before the tensor
    if (coordinates[d] < 0) fail(site, "%s at coordinate %d of dimension %d: an illegal instruction", instruction, coordinates[d], d);
  }
  const SharedPlace place = tile(from, box, instruction, site);
  if (place.block != current->block) fail(site, "%s from another block's shared memory", instruction);
  start({place.block, place.offset, box.bytes(), map->swizzle, reduction, map->type,
         [box](const std::function<void(unsigned char*, uint32_t)>& f) {
           box.for_each([&](unsigned char* to, uint32_t offset) {
             if (to != nullptr) f(to, offset);
           });
         },
         site, {}});
}

void bulk_load(uint32_t to, const void* from, uint32_t bytes, uint32_t mbarrier, uint16_t blocks, Site site) {
  Ignored ignored;
  const char* instruction = "cp.async.bulk";
  enter(instruction, site);
  if (bytes % kPiece != 0 || reinterpret_cast<uintptr_t>(from) % kPiece != 0) {
    fail(site, "%s: %u bytes from %p; wanted multiples of 16", instruction, bytes, from);
  }
  if (out_of_bounds(from, bytes)) fail(site, "%s: the source is out of bounds", instruction);
  const auto places = destinations(to, mbarrier, blocks, bytes, kPiece, instruction, site);
  defer_load(places, mbarrier, blocks, bytes, site, [from, bytes](const SharedPlace& p) {
    kernel_reads(from, bytes);
    write_both_views(p.block->shared, p.offset, from, bytes);
  });
}

void bulk_store(void* to, uint32_t from, uint32_t bytes, BulkReduction reduction, ElementType type, Site site) {
  Ignored ignored;
  const char* instruction = reduction == BulkReduction::none ? "cp.async.bulk store" : "cp.reduce.async.bulk";
  enter(instruction, site);
  if (bytes % kPiece != 0 || reinterpret_cast<uintptr_t>(to) % kPiece != 0) {
    fail(site, "%s: %u bytes to %p; wanted multiples of 16", instruction, bytes, to);
  }
  const SharedPlace place = shared_place(from, bytes, kPiece, instruction, site);
  const uint32_t size = size_of(type);
  start({place.block, place.offset, bytes, Swizzle::none, reduction, type,
         [=](const std::function<void(unsigned char*, uint32_t)>& f) {
           for (uint32_t i = 0; i < bytes; i += size) f(static_cast<unsigned char*>(to) + i, i);
         },
         site, {}});
}

void bulk_commit(Site site) {
  Ignored ignored;
  enter("cp.async.bulk.commit_group", site);
  for (const auto& store : current->bulk.open) release(store.get());  // whoever runs it comes after this thread
  for (const auto& store : current->bulk.open) defer(nullptr, site, [store] { store->write_global(); });
  current->bulk.committed.push_back(std::move(current->bulk.open));
  current->bulk.open.clear();
}

void bulk_wait(int groups, bool only_read, Site site) {
  Ignored ignored;
  enter(only_read ? "cp.async.bulk.wait_group.read" : "cp.async.bulk.wait_group", site);
  auto& committed = current->bulk.committed;
  const int done = static_cast<int>(committed.size()) - groups;
  for (int i = 0; i < done; i++) {
    for (const auto& store : committed[static_cast<size_t>(i)]) {
      only_read ? store->read_shared() : store->write_global();
      acquire(store.get());  // it may have happened before, while another thread had its turn
    }
  }
  // Groups whose global writes are still to come stay, for a later wait without .read.
  if (!only_read && done > 0) committed.erase(committed.begin(), committed.begin() + done);
}

// Publishes every thread's ordinary writes, where the hardware publishes the calling thread's (with those that it has
// synchronised with): a missing fence is found, one in the wrong thread may not be.
void fence_proxy_async(Site site) {
  Ignored ignored;
  enter("fence.proxy.async", site);
  SharedMemory& shared = current->block->shared;
  copy_quietly(shared.async_view, shared.data, shared.top);
  current->block->mbarriers.unfenced = false;
}

void check_no_stores_at_exit() {
  for (const auto& store : current->bulk.open) fail(store->site, "a thread exits with a bulk store that it never committed");
  for (const auto& group : current->bulk.committed) {
    for (const auto& store : group) {
      if (!store->was_read) fail(store->site, "a thread exits with a bulk store under way, which still reads its shared memory");
    }
  }
}

}  // namespace fastlm::emulator
