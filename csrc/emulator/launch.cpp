// A launch: the blocks of the grid, in the schedule's order, some of them at a time.
#include <mutex>

#include "emulator/cuda.h"
#include "emulator/sanitizer.h"
#include "emulator/scheduler.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace fastlm::emulator {
namespace {

constexpr unsigned kMaxThreads = 1024;

// Everything that is used again by later blocks and launches: stacks and shared memory are expensive to make.
struct Pool {
  std::vector<Thread*> threads;
  std::vector<Cluster*> clusters;
};
Pool& pool = *new Pool;

struct Grid {
  LaunchConfig config;
  const std::function<void()>* thread;
  std::vector<uint64_t> order;  // of the clusters
  size_t started = 0;
  size_t at_a_time = 1;  // clusters that run together, as long as they do not wait for others
  size_t limit = 1;
  std::vector<Cluster*> resident;
  char begun = 0, ended = 0;  // ThreadSanitizer's tags
};
Grid* grid = nullptr;

void run_thread() {
  fiber_started();
  acquire(&grid->begun);
  (*grid->thread)();
  begin_ignoring();
  release(&grid->ended);
  current->fiber.finished = true;
  current->warp->live &= ~(1u << current->lane);
  current->block->live--;
  thread_leaves_barriers(*current->block);
  thread_ended();
}

Thread* new_thread() {
  if (pool.threads.empty()) return new Thread;
  Thread* t = pool.threads.back();
  pool.threads.pop_back();
  return t;
}

void start_block(Block& block, uint64_t index) {
  const dim3 g = grid->config.grid, b = grid->config.block;
  block.index = {static_cast<unsigned>(index % g.x), static_cast<unsigned>(index / g.x % g.y),
                 static_cast<unsigned>(index / g.x / g.y)};
  const unsigned threads = b.x * b.y * b.z;
  block.live = static_cast<int>(threads);
  block.shared.reset(grid->config.shared);
  for (NamedBarrier& barrier : block.barriers) barrier = NamedBarrier();
  block.warps.assign((threads + 31) / 32, Warp());
  block.threads.clear();
  for (unsigned i = 0; i < threads; i++) {
    Thread* t = new_thread();
    const Fiber fiber = t->fiber;
    *t = Thread();
    t->fiber = fiber;
    t->index = {i % b.x, i / b.x % b.y, i / b.x / b.y};
    t->linear = static_cast<int>(i);
    t->lane = static_cast<int>(i % 32);
    t->block = &block;
    t->warp = &block.warps[i / 32];
    t->warp->block = &block;
    t->warp->index = static_cast<int>(i / 32);
    t->warp->live |= 1u << t->lane;
    prepare(t->fiber, run_thread, i);
    block.threads.push_back(t);
    enlist(t);
  }
}

void start_cluster() {
  Cluster* cluster = pool.clusters.empty() ? new Cluster : pool.clusters.back();
  if (!pool.clusters.empty()) pool.clusters.pop_back();
  const uint64_t index = grid->order[grid->started++];
  if (cluster->blocks.empty()) cluster->blocks.push_back(std::make_unique<Block>());
  cluster->live_blocks = 1;
  cluster->blocks[0]->cluster = cluster;
  start_block(*cluster->blocks[0], index);
  grid->resident.push_back(cluster);
}

void recycle(Cluster* cluster) {
  for (auto& block : cluster->blocks) {
    dismiss_block(block.get());
    for (Thread* t : block->threads) pool.threads.push_back(t);
    block->threads.clear();
    block->shared.retire();
  }
  pool.clusters.push_back(cluster);
  grid->resident.erase(std::find(grid->resident.begin(), grid->resident.end(), cluster));
}

// The blocks that have ended leave their place to the next ones. Returns what was wrong with one, or nothing.
std::string retire_ended() {
  for (size_t i = 0; i < grid->resident.size();) {
    Cluster* cluster = grid->resident[i];
    bool ended = true;
    for (auto& block : cluster->blocks) ended = ended && block->live == 0;
    if (!ended) {
      i++;
      continue;
    }
    for (auto& block : cluster->blocks) {
      const std::string wrong = block->shared.overwritten();
      if (!wrong.empty()) {
        return wrong + " [block (" + std::to_string(block->index.x) + ", " + std::to_string(block->index.y) + ", " +
               std::to_string(block->index.z) + "), schedule " + describe_schedule() + "]";
      }
    }
    recycle(cluster);
  }
  return "";
}

void run_grid() {
  for (;;) {
    while (grid->started < grid->order.size() && grid->resident.size() < grid->at_a_time) start_cluster();
    if (grid->resident.empty()) return;
    const Pause pause = run_threads();
    if (pause == Pause::error) throw LaunchError(schedule_error());
    if (pause == Pause::block_wanted) start_cluster();
    const std::string wrong = retire_ended();
    if (!wrong.empty()) throw LaunchError(wrong);
  }
}

void check(const LaunchConfig& c) {
  const uint64_t threads = uint64_t{c.block.x} * c.block.y * c.block.z;
  if (threads == 0 || threads > kMaxThreads) throw LaunchError("invalid configuration: a block has 1 to 1024 threads");
  if (c.block.z > 64) throw LaunchError("invalid configuration: a block is at most 64 deep");
  if (c.grid.x == 0 || c.grid.y == 0 || c.grid.z == 0) throw LaunchError("invalid configuration: an empty grid");
  if (c.grid.x > 2147483647u || c.grid.y > 65535 || c.grid.z > 65535) {
    throw LaunchError("invalid configuration: a grid has at most 2147483647 x 65535 x 65535 blocks");
  }
  if (c.shared > kSharedLimit) throw LaunchError("invalid configuration: a block has at most 232448 bytes of shared memory");
}

// A failed launch leaves threads in the middle of their code; their stacks are not used again.
void abandon() {
  current = nullptr;
  drop_schedule();
  for (Cluster* cluster : grid->resident) {
    for (auto& block : cluster->blocks) {
      if (block->shared.data != nullptr) allow(block->shared.data, kArena);
    }
  }
}

}  // namespace

void launch_threads(const LaunchConfig& config, const char*, const std::function<void()>& thread) {
  static std::mutex one_launch_at_a_time;
  const std::lock_guard<std::mutex> lock(one_launch_at_a_time);
  Ignored ignored;
  check(config);
  const Options options = options_from_environment();
  Grid g;
  g.config = config;
  g.thread = &thread;
  grid = &g;
  gridDim = config.grid;
  blockDim = config.block;
  begin_schedule(options, [] { return grid->started < grid->order.size() && grid->resident.size() < grid->limit; });
  g.order.resize(uint64_t{config.grid.x} * config.grid.y * config.grid.z);
  for (size_t i = 0; i < g.order.size(); i++) g.order[i] = i;
  g.limit = static_cast<size_t>(options.resident);
  if (random_schedule()) {
    for (size_t i = g.order.size(); i > 1; i--) std::swap(g.order[i - 1], g.order[random_source().below(i)]);
    g.at_a_time = std::min<size_t>(g.limit, 1 + random_source().below(4));
  }
  release(&g.begun);
  try {
    run_grid();
  } catch (...) {
    abandon();
    throw;
  }
  acquire(&g.ended);
}

}  // namespace fastlm::emulator
