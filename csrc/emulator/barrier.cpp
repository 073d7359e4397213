#include "emulator/barrier.h"

#include "emulator/cuda.h"
#include "emulator/sanitizer.h"
#include "emulator/scheduler.h"

namespace fastlm::emulator {
namespace {

void complete(NamedBarrier& b) {
  b.arrived = 0;
  b.phase ^= 1;
  b.count = b.counted;
  b.counted = 0;
  for (Thread* t : b.waiting) make_ready(t);
  b.waiting.clear();
  note_progress();
}

void arrive(int id, int threads, bool wait, int predicate, const char* instruction, Site site) {
  enter(instruction, site);
  Block& block = *current->block;
  if (id < 0 || id > 15) fail(site, "%s: barrier %d; there are 0 to 15", instruction, id);
  if (threads % 32 != 0) fail(site, "%s: %d threads; wanted a multiple of 32", instruction, threads);
  NamedBarrier& b = block.barriers[id];
  if (b.arrived == 0) {
    b.wanted = threads;
    b.first = site;
  } else if (b.wanted != threads) {
    fail(site, "barrier %d: %d threads wanted here, %d at %s:%d", id, threads, b.wanted, b.first.file, b.first.line);
  } else if (threads == 0 && (b.first.line != site.line || b.first.file != site.file)) {
    fail(site, "__syncthreads in divergent code: this thread is here, others are at %s:%d", b.first.file, b.first.line);
  }
  SyncTag* tag = &b.tags[b.phase];
  release(tag);
  b.counted += predicate != 0 ? 1 : 0;
  b.arrived++;
  if (b.arrived == (threads == 0 ? block.live : threads)) {
    complete(b);
    if (wait) acquire(tag);
    if (random_schedule()) yield();
  } else if (wait) {
    b.waiting.push_back(current);
    suspend();
    acquire(tag);
  }
}

}  // namespace

void syncthreads(Site site) {
  Ignored ignored;
  arrive(0, 0, true, 0, "__syncthreads", site);
}

int syncthreads_count(int predicate, Site site) {
  Ignored ignored;
  arrive(0, 0, true, predicate, "__syncthreads_count", site);
  return current->block->barriers[0].count;
}

void named_barrier_sync(int id, int threads, Site site) {
  Ignored ignored;
  arrive(id, threads, true, 0, "bar.sync", site);
}

void named_barrier_arrive(int id, int threads, Site site) {
  Ignored ignored;
  arrive(id, threads, false, 0, "bar.arrive", site);
}

void thread_leaves_barriers(Block& block) {
  NamedBarrier& b = block.barriers[0];
  if (b.arrived > 0 && b.wanted == 0 && b.arrived >= block.live) complete(b);
}

}  // namespace fastlm::emulator
