#include "common/pool.h"

#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <iterator>
#include <map>
#include <mutex>
#include <new>
#include <vector>

namespace fastlm {
namespace {

constexpr size_t kHugePage = size_t(2) << 20;
constexpr size_t kGranule = size_t(64) << 10;  // of all sizes
constexpr size_t kSmallHole = 4;               // times what is wanted
constexpr size_t kRegion = size_t(1) << 30;    // of addresses, asked of the system at a time; memory comes with their use

size_t rounded_up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

// An eighth of the machine's memory.
size_t default_limit() {
  const long pages = sysconf(_SC_PHYS_PAGES), page = sysconf(_SC_PAGESIZE);
  return pages > 0 && page > 0 ? static_cast<size_t>(pages) / 8 * static_cast<size_t>(page) : size_t(1) << 30;
}

// Addresses that nobody uses: with memory behind them (kept) or without (never touched, or given back).
struct Hole {
  size_t bytes;
  bool kept;
  uint64_t time;          // of the last gift in it
  bool young_at_the_top;  // the last gift lies at its high end, not at its low one
};
using Holes = std::map<char*, Hole>;

struct Pool {
  std::mutex mutex;
  std::map<char*, size_t> regions;
  Holes holes;  // neighbours of the same kind are one
  uint64_t time = 0;
  PoolState state{default_limit(), 0, 0, 0, 0};
};

// Never destroyed: tensors may die after static objects do. A process that is forked while another thread holds the mutex
// would inherit it locked, for ever: so whoever forks holds it.
Pool& pool() {
  static Pool* const p = new Pool;
  static const int registered = pthread_atfork([] { p->mutex.lock(); }, [] { p->mutex.unlock(); }, [] { p->mutex.unlock(); });
  static_cast<void>(registered);
  return *p;
}

// Addresses that begin at a multiple of 2 MB, so that every 2 MB of them can be one huge page; null: there are none.
char* map(size_t bytes) {
  constexpr int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  char* const start = static_cast<char*>(mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE, flags, -1, 0));
  if (start == MAP_FAILED) return nullptr;
  const size_t before = (kHugePage - reinterpret_cast<uintptr_t>(start) % kHugePage) % kHugePage;
  if (before > 0) munmap(start, before);
  if (before < kHugePage) munmap(start + before + bytes, kHugePage - before);
#if defined(MADV_HUGEPAGE)
  madvise(start + before, bytes, MADV_HUGEPAGE);  // a wish: without it memory is slower to touch, and as good
#endif
  return start + before;
}

// What follows up to `take` is called with the mutex held.

// Puts a hole on the map, as one with its neighbours of the same kind.
void add(Pool& p, char* start, Hole hole) {
  const auto one = [&](char* border, const Hole& other) { return other.kept == hole.kept && !p.regions.count(border); };
  auto next = p.holes.upper_bound(start);
  if (next != p.holes.end() && start + hole.bytes == next->first && one(next->first, next->second)) {
    const Hole& other = next->second;
    hole = {hole.bytes + other.bytes, hole.kept, std::max(hole.time, other.time), other.time > hole.time};
    next = p.holes.erase(next);
  }
  if (next != p.holes.begin()) {
    const auto previous = std::prev(next);
    Hole& other = previous->second;
    if (previous->first + other.bytes == start && one(start, other)) {
      other = {other.bytes + hole.bytes, hole.kept, std::max(hole.time, other.time), hole.time > other.time};
      return;
    }
  }
  p.holes.emplace_hint(next, start, hole);
}

bool add_region(Pool& p, size_t wanted) {
  for (const size_t bytes : {rounded_up(std::max(wanted, kRegion), kHugePage), rounded_up(wanted, kHugePage)}) {
    if (char* const start = map(bytes)) {
      p.regions.emplace(start, bytes);
      p.holes.emplace(start, Hole{bytes, false, 0, false});
      return true;
    }
  }
  return false;
}

// The high end of `at`, or its low end; it is large enough.
char* carve(Pool& p, Holes::iterator at, size_t wanted, bool high) {
  char* const start = at->first;
  Hole rest = at->second;
  rest.bytes -= wanted;
  p.holes.erase(at);
  if (rest.bytes > 0) p.holes.emplace(high ? start : start + wanted, rest);
  return high ? start + rest.bytes : start;
}

// From kept memory: from the smallest hole that is large enough; of equal ones from the youngest, and from its younger
// end, which is the likeliest to be in a cache. Of a hole many times as large always from the low end: it would be in two
// pieces soon, too small for the large tensors. Null: there is none.
char* take_kept(Pool& p, size_t wanted) {
  auto best = p.holes.end();
  for (auto it = p.holes.begin(); it != p.holes.end(); ++it) {
    const Hole& hole = it->second;
    if (!hole.kept || hole.bytes < wanted) continue;
    if (best == p.holes.end() || hole.bytes < best->second.bytes ||
        (hole.bytes == best->second.bytes && hole.time > best->second.time)) {
      best = it;
    }
  }
  if (best == p.holes.end()) return nullptr;
  p.state.unused -= wanted;
  const bool small = best->second.bytes / kSmallHole <= wanted;
  return carve(p, best, wanted, small && best->second.young_at_the_top);
}

// From a hole without memory and the kept one that ends where it begins, so that the least memory is new. Null: no hole
// is large enough.
char* take_fresh(Pool& p, size_t wanted) {
  auto best = p.holes.end();
  size_t most = 0;  // kept bytes before it
  for (auto it = p.holes.begin(); it != p.holes.end(); ++it) {
    if (it->second.kept) continue;
    size_t kept = 0;
    if (it != p.holes.begin() && !p.regions.count(it->first)) {
      const auto previous = std::prev(it);
      if (previous->second.kept && previous->first + previous->second.bytes == it->first) kept = previous->second.bytes;
    }
    if (kept + it->second.bytes < wanted || (best != p.holes.end() && kept <= most)) continue;
    best = it, most = kept;
  }
  if (best == p.holes.end()) return nullptr;
  char* const start = best->first - most;
  carve(p, best, wanted - most, false);
  if (most > 0) p.holes.erase(start);
  p.state.unused -= most;
  return start;
}

// Gives kept memory beyond `limit` back to the system, oldest first. That takes long: the mutex is let go meanwhile.
void shrink(Pool& p, std::unique_lock<std::mutex>& lock, size_t limit) {
  std::vector<std::pair<char*, size_t>> out;
  while (p.state.unused > limit) {
    auto oldest = p.holes.end();
    for (auto it = p.holes.begin(); it != p.holes.end(); ++it) {
      if (it->second.kept && (oldest == p.holes.end() || it->second.time < oldest->second.time)) oldest = it;
    }
    const size_t bytes = std::min(rounded_up(p.state.unused - limit, kGranule), oldest->second.bytes);
    out.emplace_back(carve(p, oldest, bytes, false), bytes);
    p.state.unused -= bytes;
  }
  lock.unlock();
  for (const auto& [start, bytes] : out) madvise(start, bytes, MADV_DONTNEED);
  lock.lock();
  for (const auto& [start, bytes] : out) {
    add(p, start, Hole{bytes, false, 0, false});
    const auto region = std::prev(p.regions.upper_bound(start));
    const auto hole = p.holes.find(region->first);
    if (hole == p.holes.end() || hole->second.kept || hole->second.bytes != region->second) continue;
    munmap(region->first, region->second);  // nothing is left in it
    p.holes.erase(hole);
    p.regions.erase(region);
  }
}

char* take(Pool& p, std::unique_lock<std::mutex>& lock, size_t wanted) {
  if (char* const data = take_kept(p, wanted)) {
    ++p.state.reused;
    return data;
  }
  for (const bool last_try : {false, true}) {
    if (char* const data = take_fresh(p, wanted)) {
      ++p.state.fresh;
      return data;
    }
    if (!add_region(p, wanted)) {
      if (last_try) break;
      shrink(p, lock, 0);  // what lies unused may be all that is missing
    }
  }
  throw std::bad_alloc();
}

}  // namespace

PoolBlock pool_take(size_t bytes) {
  if (bytes > SIZE_MAX / 2) throw std::bad_alloc();
  Pool& p = pool();
  const size_t wanted = rounded_up(std::max<size_t>(1, bytes), kGranule);
  std::unique_lock<std::mutex> lock(p.mutex);
  char* const data = take(p, lock, wanted);
  p.state.used += wanted;
  return {data, wanted};
}

void pool_give(PoolBlock block) noexcept {
  Pool& p = pool();
  std::unique_lock<std::mutex> lock(p.mutex);
  p.state.used -= block.bytes;
  p.state.unused += block.bytes;
  add(p, static_cast<char*>(block.data), Hole{block.bytes, true, ++p.time, false});
  if (p.state.unused > p.state.limit) shrink(p, lock, p.state.limit);
}

void pool_set_limit(size_t bytes) {
  Pool& p = pool();
  std::unique_lock<std::mutex> lock(p.mutex);
  p.state.limit = bytes;
  shrink(p, lock, bytes);
}

void pool_release() {
  Pool& p = pool();
  std::unique_lock<std::mutex> lock(p.mutex);
  shrink(p, lock, 0);
}

PoolState pool_state() {
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  return p.state;
}

}  // namespace fastlm
