// A launch: the blocks of the grid, in the schedule's order, some of them at a time.
#include <mutex>

#include "emulator/conflicts.h"
#include "emulator/cuda.h"
#include "emulator/grid_dependency.h"
#include "emulator/sanitizer.h"
#include "emulator/scheduler.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace fastlm::emulator {
namespace {

constexpr unsigned kMaxThreads = 1024;
constexpr size_t kFreshThreads = 1024;  // of a launch, see forget_last_owner: enough for several small blocks

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
  size_t threads = 0;  // begun
  size_t at_a_time = 1;  // clusters that run together, as long as they do not wait for others
  size_t limit = 1;
  std::vector<Cluster*> resident;
  SyncTag begun, ended;
};
Grid* grid = nullptr;

void run_thread() {
  fiber_started();
  acquire(&grid->begun);
  (*grid->thread)();
  begin_ignoring();
  check_no_stores_at_exit();
  check_no_wgmma_at_exit();
  release(&grid->ended);
  current->fiber.finished = true;
  current->warp->live &= ~(1u << current->lane);
  current->block->live--;
  thread_leaves_barriers(*current->block);
  thread_leaves_cluster(*current->block->cluster);
  thread_ended();
}

Thread* new_thread() {
  if (pool.threads.empty()) return new Thread;
  Thread* t = pool.threads.back();
  pool.threads.pop_back();
  return t;
}

void start_block(Block& block, uint3 index) {
  const dim3 b = grid->config.block;
  block.index = index;
  const unsigned threads = b.x * b.y * b.z;
  block.live = static_cast<int>(threads);
  block.shared.reset(grid->config.shared, grid->config.opted_in);
  for (NamedBarrier& barrier : block.barriers) barrier = NamedBarrier();
  block.mbarriers = Mbarriers();
  block.registers = RegisterPool();
  block.warps = std::vector<Warp>((threads + 31) / 32);
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
    t->warp->registers = initial_registers(static_cast<int>(threads));
    prepare(t->fiber, run_thread, i, grid->threads++ < kFreshThreads);
    block.threads.push_back(t);
    enlist(t);
  }
}

void start_cluster() {
  Cluster* cluster = pool.clusters.empty() ? new Cluster : pool.clusters.back();
  if (!pool.clusters.empty()) pool.clusters.pop_back();
  cluster->barrier = ClusterBarrier();
  const dim3 g = grid->config.grid, c = grid->config.cluster;
  const unsigned blocks = c.x * c.y * c.z;
  while (cluster->blocks.size() < blocks) cluster->blocks.push_back(std::make_unique<Block>());
  cluster->blocks.resize(blocks);
  const uint64_t index = grid->order[grid->started++];
  const unsigned across = g.x / c.x, down = g.y / c.y;
  const unsigned x = index % across * c.x, y = index / across % down * c.y, z = static_cast<unsigned>(index / across / down) * c.z;
  for (unsigned rank = 0; rank < blocks; rank++) {
    Block& block = *cluster->blocks[rank];
    block.cluster = cluster;
    block.rank = static_cast<int>(rank);
    start_block(block, {x + rank % c.x, y + rank / c.x % c.y, z + rank / c.x / c.y});
  }
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
      const char* diverged = diverged_warpgroup(*block);
      std::string wrong = diverged != nullptr ? diverged : block->shared.overwritten();
      if (wrong.empty()) wrong = under_way(*block);
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
    if (grid->resident.empty()) return finish_events();
    const Pause pause = run_threads();
    if (pause == Pause::error) throw LaunchError(schedule_error());
    if (pause == Pause::block_wanted) start_cluster();
    const std::string wrong = retire_ended();
    if (!wrong.empty()) throw LaunchError(wrong);
  }
}

void check(const LaunchConfig& c, size_t shared_limit) {
  const uint64_t threads = uint64_t{c.block.x} * c.block.y * c.block.z;
  if (threads == 0 || threads > kMaxThreads) throw LaunchError("invalid configuration: a block has 1 to 1024 threads");
  if (c.block.z > 64) throw LaunchError("invalid configuration: a block is at most 64 deep");
  if (c.grid.x == 0 || c.grid.y == 0 || c.grid.z == 0) throw LaunchError("invalid configuration: an empty grid");
  if (c.grid.x > 2147483647u || c.grid.y > 65535 || c.grid.z > 65535) {
    throw LaunchError("invalid configuration: a grid has at most 2147483647 x 65535 x 65535 blocks");
  }
  const dim3 k = c.cluster;
  if (k.x == 0 || k.y == 0 || k.z == 0 || k.x * k.y * k.z > 8) throw LaunchError("invalid configuration: a cluster has 1 to 8 blocks");
  if (c.grid.x % k.x != 0 || c.grid.y % k.y != 0 || c.grid.z % k.z != 0) {
    throw LaunchError("invalid configuration: the grid is not made of whole clusters");
  }
  if (c.shared > shared_limit) {
    throw LaunchError("invalid configuration: a block has at most " + std::to_string(shared_limit) + " bytes of shared memory");
  }
}

// A failed launch leaves threads in the middle of their code. Their stacks are used again without being unwound: what
// the kernel's objects own is lost, and kernels own nothing.
void abandon() {
  current = nullptr;
  drop_schedule();
  while (!grid->resident.empty()) recycle(grid->resident.back());
}

}  // namespace

size_t max_shared_memory() { return options_from_environment().shared; }
int multiprocessors() { return options_from_environment().multiprocessors; }

void launch_threads(const LaunchConfig& config, const std::function<void()>& thread) {
  static std::mutex one_launch_at_a_time;
  const std::lock_guard<std::mutex> lock(one_launch_at_a_time);
  Ignored ignored;
  const Options options = options_from_environment();
  check(config, options.shared);
  Grid g;
  g.config = config;
  g.thread = &thread;
  grid = &g;
  gridDim = config.grid;
  blockDim = config.block;
  begin_schedule(options, [] { return grid->started < grid->order.size() && grid->resident.size() < grid->limit; });
  const dim3 c = config.cluster;
  g.order.resize(uint64_t{config.grid.x / c.x} * (config.grid.y / c.y) * (config.grid.z / c.z));
  for (size_t i = 0; i < g.order.size(); i++) g.order[i] = i;
  g.limit = static_cast<size_t>(options.resident);
  if (random_schedule()) {
    for (size_t i = g.order.size(); i > 1; i--) std::swap(g.order[i - 1], g.order[random_source().below(i)]);
    g.at_a_time = std::min<size_t>(g.limit, 1 + random_source().below(4));
  }
  begin_grid_dependency(config.programmatic);
  begin_counts();
  release(&g.begun);
  try {
    run_grid();
    if (missing_grid_dependency() != nullptr) throw LaunchError(missing_grid_dependency());
  } catch (...) {
    abandon();
    throw;
  }
  acquire(&g.ended);
  write_counts(config.grid, config.block, config.shared);
}

}  // namespace fastlm::emulator
