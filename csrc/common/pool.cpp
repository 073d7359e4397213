#include "common/pool.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <iterator>
#include <list>
#include <mutex>
#include <new>

namespace fastlm {
namespace {

constexpr size_t kHugePage = size_t(2) << 20;
constexpr size_t kGranule = size_t(64) << 10;  // sizes are rounded up to this, so that nearly equal ones share blocks

// An eighth of the machine's memory.
size_t default_limit() {
  const long pages = sysconf(_SC_PHYS_PAGES), page = sysconf(_SC_PAGESIZE);
  return pages > 0 && page > 0 ? static_cast<size_t>(pages) / 8 * static_cast<size_t>(page) : size_t(1) << 30;
}

struct Pool {
  std::mutex mutex;
  std::list<PoolBlock> free;  // the one that was given back last is in front: it is the likeliest to be in a cache
  PoolState state{default_limit(), 0, 0, 0, 0};
};

// Never destroyed: tensors may die after static objects do.
Pool& pool() {
  static Pool* const p = new Pool;
  return *p;
}

void unmap(PoolBlock block) { munmap(block.data, block.bytes); }

// A mapping that begins at a multiple of 2 MB, so that every 2 MB of it can be one huge page.
PoolBlock map(size_t bytes) {
  char* const start =
      static_cast<char*>(mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (start == MAP_FAILED) throw std::bad_alloc();
  const size_t before = (kHugePage - reinterpret_cast<uintptr_t>(start) % kHugePage) % kHugePage;
  if (before > 0) munmap(start, before);
  if (before < kHugePage) munmap(start + before + bytes, kHugePage - before);
#if defined(MADV_HUGEPAGE)
  madvise(start + before, bytes, MADV_HUGEPAGE);  // a wish: without it the block is slower to touch, and as good
#endif
  return {start + before, bytes};
}

// With the mutex held: takes out what is over the limit, oldest first. The caller unmaps it without the mutex.
std::list<PoolBlock> surplus(Pool& p) {
  std::list<PoolBlock> out;
  while (p.state.unused > p.state.limit && !p.free.empty()) {
    p.state.unused -= p.free.back().bytes;
    out.splice(out.end(), p.free, std::prev(p.free.end()));
  }
  return out;
}

}  // namespace

PoolBlock pool_take(size_t bytes) {
  Pool& p = pool();
  const size_t wanted = std::max<size_t>(1, (bytes + kGranule - 1) / kGranule) * kGranule;
  {
    const std::lock_guard<std::mutex> lock(p.mutex);
    auto best = p.free.end();
    for (auto it = p.free.begin(); it != p.free.end(); ++it) {
      // A block may be up to a quarter larger than it need be: activations of similar sizes share, small ones waste nothing.
      if (it->bytes < wanted || it->bytes > wanted + wanted / 4) continue;
      if (best == p.free.end() || it->bytes < best->bytes) best = it;
      if (best->bytes == wanted) break;
    }
    if (best != p.free.end()) {
      const PoolBlock block = *best;
      p.free.erase(best);
      p.state.unused -= block.bytes;
      p.state.used += block.bytes;
      ++p.state.reused;
      return block;
    }
  }
  PoolBlock block;
  try {
    block = map(wanted);
  } catch (const std::bad_alloc&) {
    pool_release();  // what lies unused in other sizes may be all that is missing
    block = map(wanted);
  }
  const std::lock_guard<std::mutex> lock(p.mutex);
  p.state.used += block.bytes;
  ++p.state.fresh;
  return block;
}

void pool_give(PoolBlock block) noexcept {
  Pool& p = pool();
  std::list<PoolBlock> node(1, block), out;
  {
    const std::lock_guard<std::mutex> lock(p.mutex);
    p.state.used -= block.bytes;
    p.state.unused += block.bytes;
    p.free.splice(p.free.begin(), node);
    out = surplus(p);
  }
  for (const PoolBlock& b : out) unmap(b);
}

void pool_set_limit(size_t bytes) {
  Pool& p = pool();
  std::list<PoolBlock> out;
  {
    const std::lock_guard<std::mutex> lock(p.mutex);
    p.state.limit = bytes;
    out = surplus(p);
  }
  for (const PoolBlock& b : out) unmap(b);
}

void pool_release() {
  Pool& p = pool();
  std::list<PoolBlock> out;
  {
    const std::lock_guard<std::mutex> lock(p.mutex);
    out.swap(p.free);
    p.state.unused = 0;
  }
  for (const PoolBlock& b : out) unmap(b);
}

PoolState pool_state() {
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  return p.state;
}

}  // namespace fastlm
