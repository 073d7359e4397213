#include "emulator/mbarrier.h"

#include "emulator/sanitizer.h"
#include "emulator/scheduler.h"

namespace fastlm::emulator {
namespace {

// As it lies in shared memory: eight bytes that a kernel must not look into. Poisoned memory is not a valid mbarrier.
struct Mbarrier {
  uint64_t pending : 20;   // arrivals that are still to come in this phase
  uint64_t count : 20;     // arrivals of a phase
  uint64_t phase : 1;      // the parity of the phase that is not yet complete
  uint64_t bytes : 22;     // expected and not landed, plus kNoBytes
  uint64_t invalid : 1;
};
static_assert(sizeof(Mbarrier) == 8, "");
constexpr uint64_t kNoBytes = 1u << 21;
constexpr uint32_t kMaxCount = (1u << 20) - 1;  // PTX ISA: of arrivals, and of bytes

Mbarrier& valid(unsigned char* p, Site site) {
  auto* m = reinterpret_cast<Mbarrier*>(p);
  if (m->invalid != 0) fail(site, "an mbarrier that was not initialised");
  return *m;
}

Mbarrier& at(uint32_t address, const char* instruction, Site site) {
  unsigned char* p = shared_place(address, 8, 8, instruction, site).data;
  kernel_reads(p, 8);
  return valid(p, site);
}

void check_phase(Block& block, uint32_t offset, Mbarrier& m) {
  note_progress();
  if (m.pending != 0 || m.bytes != kNoBytes) return;
  m.phase ^= 1;
  m.pending = m.count;
  auto& waiting = block.mbarriers.waiting;
  for (size_t i = 0; i < waiting.size();) {
    if (waiting[i].offset == offset && waiting[i].parity != m.phase) {
      make_ready(waiting[i].thread);
      waiting.erase(waiting.begin() + static_cast<std::ptrdiff_t>(i));
    } else {
      i++;
    }
  }
}

void add_bytes(Mbarrier& m, int64_t bytes, Site site) {
  const int64_t total = static_cast<int64_t>(m.bytes) - static_cast<int64_t>(kNoBytes) + bytes;
  if (total > kMaxCount || -total > kMaxCount) fail(site, "an mbarrier that waits for %lld bytes; at most 2^20 - 1", (long long)total);
  m.bytes = static_cast<uint64_t>(total + static_cast<int64_t>(kNoBytes));
}

void take_arrivals(Mbarrier& m, uint32_t count, Site site) {
  if (count > m.pending) fail(site, "an mbarrier got more arrivals in a phase than its count of %u", (unsigned)m.count);
  m.pending -= count;
}

void arrive(uint32_t address, uint32_t count, uint32_t bytes, const char* instruction, Site site) {
  enter(instruction, site);
  const SharedPlace place = shared_place(address, 8, 8, instruction, site);
  Mbarrier& m = at(address, instruction, site);
  if (place.block != current->block && place.block->mbarriers.unfenced) {
    fail(site, "an mbarrier of another block, which has run no fence.mbarrier_init since mbarrier.init");
  }
  release(&m);
  add_bytes(m, bytes, site);
  take_arrivals(m, count, site);
  check_phase(*place.block, place.offset, m);
  preempt();  // what follows may come late
}

}  // namespace

void mbarrier_init(uint32_t address, uint32_t count, Site site) {
  Ignored ignored;
  enter("mbarrier.init", site);
  unsigned char* p = shared_place(address, 8, 8, "mbarrier.init", site).data;
  auto* m = reinterpret_cast<Mbarrier*>(p);
  if (count == 0 || count > kMaxCount) fail(site, "mbarrier.init: a count of %u; wanted 1 to 2^20 - 1", count);
  if (m->invalid == 0) fail(site, "mbarrier.init of a live mbarrier, or of memory that was written (mbarrier.inval first)");
  kernel_writes(p, 8);
  *m = Mbarrier{count, count, 0, kNoBytes, 0};
  current->block->mbarriers.unfenced = true;
}

void mbarrier_invalidate(uint32_t address, Site site) {
  Ignored ignored;
  enter("mbarrier.inval", site);
  Mbarrier& m = at(address, "mbarrier.inval", site);
  kernel_writes(&m, 8);
  fill_quietly(&m, kPoison, 8);
}

void fence_mbarrier_init(Site site) {
  Ignored ignored;
  enter("fence.mbarrier_init", site);
  current->block->mbarriers.unfenced = false;
}

void mbarrier_expect_tx(uint32_t address, uint32_t bytes, Site site) {
  Ignored ignored;
  enter("mbarrier.expect_tx", site);
  Mbarrier& m = at(address, "mbarrier.expect_tx", site);
  add_bytes(m, bytes, site);
}

void mbarrier_arrive(uint32_t address, uint32_t count, Site site) {
  Ignored ignored;
  arrive(address, count, 0, "mbarrier.arrive", site);
}

void mbarrier_arrive_expect_tx(uint32_t address, uint32_t bytes, Site site) {
  Ignored ignored;
  arrive(address, 1, bytes, "mbarrier.arrive.expect_tx", site);
}

void mbarrier_wait(uint32_t address, uint32_t parity, Site site) {
  Ignored ignored;
  enter("mbarrier.try_wait", site);
  if (address >> kRankShift != 0) fail(site, "mbarrier.try_wait on an mbarrier of another block");
  if (parity > 1) fail(site, "mbarrier.try_wait: a parity of %u; wanted 0 or 1", parity);
  const Mbarrier& m = at(address, "mbarrier.try_wait", site);
  if (m.phase == parity) {
    current->block->mbarriers.waiting.push_back({current, address, parity});
    suspend();
  }
  acquire(&m);
}

bool mbarrier_test_wait(uint32_t address, uint32_t parity, Site site) {
  Ignored ignored;
  enter("mbarrier.test_wait", site);
  if (address >> kRankShift != 0) fail(site, "mbarrier.test_wait on an mbarrier of another block");
  if (parity > 1) fail(site, "mbarrier.test_wait: a parity of %u; wanted 0 or 1", parity);
  const Mbarrier& m = at(address, "mbarrier.test_wait", site);
  if (m.phase == parity) poll();
  if (m.phase == parity) return false;
  acquire(&m);
  return true;
}

void check_mbarrier(uint32_t address, Site site) {
  const SharedPlace place = shared_place(address, 8, 8, "an asynchronous copy's mbarrier", site);
  valid(place.data, site);
  if (place.block->mbarriers.unfenced) {
    fail(site, "an asynchronous copy uses an mbarrier with no fence.mbarrier_init or fence.proxy.async since mbarrier.init");
  }
}

void mbarrier_complete_tx(Block& block, uint32_t offset, uint32_t bytes, Site site) {
  Mbarrier& m = valid(block.shared.data + offset, site);
  release(&m);
  add_bytes(m, -static_cast<int64_t>(bytes), site);
  check_phase(block, offset, m);
}

void mbarrier_arrive_later(Block& block, uint32_t offset, Site site) {
  Mbarrier& m = valid(block.shared.data + offset, site);
  release(&m);
  take_arrivals(m, 1, site);
  check_phase(block, offset, m);
}

}  // namespace fastlm::emulator
