#include "emulator/cp_async.h"

#include <cstring>

#include "emulator/mbarrier.h"
#include "emulator/sanitizer.h"
#include "emulator/scheduler.h"

namespace fastlm::emulator {

void CpAsyncGroup::complete() {
  for (const Copy& c : copies) {
    kernel_writes(c.to, static_cast<size_t>(c.bytes));
    if (c.present > 0) kernel_reads(c.from, static_cast<size_t>(c.present));
    std::memcpy(c.to, c.from, static_cast<size_t>(c.present));
    std::memset(c.to + c.present, 0, static_cast<size_t>(c.bytes - c.present));
  }
  copies.clear();
}

namespace {

CpAsyncGroup& open_group() {
  auto& open = current->cp_async.open;
  if (open == nullptr) open = std::make_shared<CpAsyncGroup>();
  return *open;
}

}  // namespace

void cp_async(uint32_t to, const void* from, int bytes, int present, Site site) {
  Ignored ignored;
  enter("cp.async", site);
  const auto size = static_cast<size_t>(bytes);
  unsigned char* destination = shared_place(to, size, size, "cp.async", site).data;
  if (reinterpret_cast<uintptr_t>(from) % size != 0) fail(site, "cp.async: the source %p is not aligned to %zu bytes", from, size);
  if (present < 0 || present > bytes) fail(site, "cp.async: %d of %d bytes wanted", present, bytes);
  if (out_of_bounds(from, static_cast<size_t>(present))) fail(site, "cp.async: the source %p is out of bounds", from);
  kernel_writes(destination, size);
  fill_quietly(destination, kPoison, size);
  open_group().copies.push_back({destination, static_cast<const unsigned char*>(from), bytes, present});
}

void cp_async_commit(Site site) {
  Ignored ignored;
  enter("cp.async.commit_group", site);
  open_group();
  current->cp_async.committed.push_back(std::move(current->cp_async.open));
}

void cp_async_wait(int groups, Site site) {
  Ignored ignored;
  enter("cp.async.wait_group", site);
  auto& committed = current->cp_async.committed;
  while (static_cast<int>(committed.size()) > groups) {
    committed.front()->complete();
    committed.erase(committed.begin());
  }
}

void cp_async_wait_all(Site site) {
  cp_async_wait(0, site);
  Ignored ignored;
  open_group().complete();
}

void cp_async_arrive(uint32_t mbarrier, Site site) {
  Ignored ignored;
  enter("cp.async.mbarrier.arrive.noinc", site);
  check_mbarrier(mbarrier, site);
  open_group();
  CpAsyncQueue& queue = current->cp_async;
  std::vector<std::shared_ptr<CpAsyncGroup>> earlier(queue.committed.begin(), queue.committed.end());
  earlier.push_back(queue.open);
  Block* block = current->block;
  defer(block, site, [block, earlier, mbarrier, site] {
    for (const auto& group : earlier) group->complete();
    mbarrier_arrive_later(*block, mbarrier, site);
  });
}

}  // namespace fastlm::emulator
