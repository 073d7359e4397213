// Mistakes with threads, warps, barriers and ordinary memory.
#include "bugs.h"
#include "common/cuda/ptx_barrier.h"
#include "common/cuda/ptx_memory.h"

namespace {

using namespace fastlm;

namespace reduction {
enum class Bug {
  none, missing_sync, divergent_sync, shared_too_short, never_written, read_past_the_end, write_past_the_end,
  shared_address_lost, own_lane_not_in_mask, shuffle_in_a_branch, exited_lanes_in_mask, different_instructions,
};

// Sums 4 warps' values: shuffles, then shared memory.
template <Bug kBug>
__global__ void block_sum(const uint32_t* in, uint32_t* out) {
  FASTLM_SHARED(uint32_t, partial, (kBug == Bug::shared_too_short ? 3 : 4));
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint32_t v = in[threadIdx.x + (kBug == Bug::read_past_the_end ? 1 : 0)];
  if (kBug == Bug::shuffle_in_a_branch) {
    if (lane < 16) v += __shfl_xor_sync(0xffffffffu, v, 1);
  }
  if (kBug == Bug::exited_lanes_in_mask && warp == 3 && lane >= 16) return;
  if (kBug == Bug::different_instructions) {
    if (lane < 16) __syncwarp();
    else v += __shfl_xor_sync(0xffffffffu, v, 1);
  }
  for (int offset = 16; offset > 0; offset /= 2) {
    v += __shfl_xor_sync(kBug == Bug::own_lane_not_in_mask ? 0x7fffffffu : 0xffffffffu, v, offset);
  }
  if (lane == 0 && !(kBug == Bug::never_written && warp == 2)) partial[warp] = v;
  if (kBug == Bug::divergent_sync) {
    if (warp == 0) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  } else if (kBug != Bug::missing_sync) {
    __syncthreads();
  }
  uint32_t sum = 0;
  for (int i = 0; i < 4; i++) sum += partial[i];
  if (kBug == Bug::shared_address_lost && threadIdx.x == 7) partial[-20] = sum;
  out[threadIdx.x + (kBug == Bug::write_past_the_end && threadIdx.x == 127 ? 1 : 0)] = sum;
}
#define BLOCK_SUM(bug) BUG_CASE(block_sum, bug, dim3(1), dim3(128), 0, 128, 128)
BLOCK_SUM(none);
BLOCK_SUM(missing_sync);
BLOCK_SUM(divergent_sync);
BLOCK_SUM(shared_too_short);
BLOCK_SUM(never_written);
BLOCK_SUM(read_past_the_end);
BLOCK_SUM(write_past_the_end);
BLOCK_SUM(shared_address_lost);
BLOCK_SUM(own_lane_not_in_mask);
BLOCK_SUM(shuffle_in_a_branch);
BLOCK_SUM(exited_lanes_in_mask);
BLOCK_SUM(different_instructions);
}  // namespace reduction

namespace exchange {
enum class Bug { none, missing_syncwarp, shuffle_instead_of_syncwarp };

template <Bug kBug>
__global__ void warp_exchange(const uint32_t* in, uint32_t* out) {
  FASTLM_SHARED(uint32_t, s, 32);
  const int l = threadIdx.x;
  s[l] = in[l];
  uint32_t v = 0;
  if (kBug == Bug::shuffle_instead_of_syncwarp) v = __shfl_xor_sync(0xffffffffu, l, 1) & 0;
  if (kBug == Bug::none) __syncwarp();
  out[l] = s[l ^ 1] + v;
}
BUG_CASE(warp_exchange, none, dim3(1), dim3(32), 0, 32, 32);
BUG_CASE(warp_exchange, missing_syncwarp, dim3(1), dim3(32), 0, 32, 32);
BUG_CASE(warp_exchange, shuffle_instead_of_syncwarp, dim3(1), dim3(32), 0, 32, 32);
}  // namespace exchange

namespace blocks {
enum class Bug { none, not_atomic, missing_release, missing_acquire, nobody_releases, misaligned_atomic };

// The last block to arrive sums what all have written.
template <Bug kBug>
__global__ void last_block_sums(const uint32_t* in, uint32_t* out) {
  FASTLM_SHARED(uint32_t, last, 1);
  uint32_t* counter = out + 32;
  uint32_t* partial = out + 33;
  partial[32 * blockIdx.x + threadIdx.x] = in[32 * blockIdx.x + threadIdx.x];
  if (kBug != Bug::missing_release) __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    if (kBug == Bug::misaligned_atomic) counter = reinterpret_cast<uint32_t*>(reinterpret_cast<char*>(counter) + 2);
    uint32_t arrived;
    if (kBug == Bug::not_atomic) arrived = (*counter)++;
    else arrived = atomicAdd(counter, 1u);
    if (kBug != Bug::missing_acquire) __threadfence();
    last[0] = arrived == gridDim.x - 1;
  }
  __syncthreads();
  if (!last[0]) return;
  uint32_t sum = 0;
  for (unsigned b = 0; b < gridDim.x; b++) sum += partial[32 * b + threadIdx.x];
  out[threadIdx.x] = sum;
}
BUG_CASE(last_block_sums, none, dim3(4), dim3(32), 0, 128, 161);
BUG_CASE(last_block_sums, not_atomic, dim3(4), dim3(32), 0, 128, 161);
BUG_CASE(last_block_sums, missing_release, dim3(4), dim3(32), 0, 128, 161);
BUG_CASE(last_block_sums, missing_acquire, dim3(4), dim3(32), 0, 128, 161);
BUG_CASE(last_block_sums, misaligned_atomic, dim3(4), dim3(32), 0, 128, 161);

// Blocks take turns.
template <Bug kBug>
__global__ void in_turn(const uint32_t* in, uint32_t* out) {
  uint32_t* turn = out + 32;
  if (threadIdx.x == 0) {
    while ((kBug == Bug::missing_acquire ? ptx::load_relaxed(turn) : ptx::load_acquire(turn)) != blockIdx.x) {
    }
  }
  __syncthreads();
  out[threadIdx.x] = 3 * out[threadIdx.x] + in[32 * blockIdx.x + threadIdx.x];
  __syncthreads();
  if (threadIdx.x == 0) {
    if (kBug == Bug::missing_release) ptx::store_relaxed(turn, blockIdx.x + 1);
    else if (!(kBug == Bug::nobody_releases && blockIdx.x == 2)) ptx::store_release(turn, blockIdx.x + 1);
  }
}
BUG_CASE(in_turn, none, dim3(4), dim3(32), 0, 128, 33);
BUG_CASE(in_turn, missing_release, dim3(4), dim3(32), 0, 128, 33);
BUG_CASE(in_turn, missing_acquire, dim3(4), dim3(32), 0, 128, 33);
BUG_CASE(in_turn, nobody_releases, dim3(4), dim3(32), 0, 128, 33);
}  // namespace blocks

namespace named {
enum class Bug { none, missing_arrive, wrong_count, wrong_barrier, missing_sync, half_a_warp, no_such_barrier };

// A producer warp hands 32 values to a consumer warp.
template <Bug kBug>
__global__ void hand_over(const uint32_t* in, uint32_t* out) {
  FASTLM_SHARED(uint32_t, s, 32);
  const int l = threadIdx.x % 32;
  if (threadIdx.x < 32) {
    s[l] = in[l];
    if (kBug != Bug::missing_arrive) ptx::barrier_arrive(kBug == Bug::wrong_barrier ? 2 : 1, 64);
  } else {
    if (kBug == Bug::half_a_warp && l < 16) ptx::barrier_sync(1, 64);
    else if (kBug == Bug::no_such_barrier) ptx::barrier_sync(16, 64);
    else if (kBug != Bug::missing_sync && kBug != Bug::half_a_warp) ptx::barrier_sync(1, kBug == Bug::wrong_count ? 96 : 64);
    out[l] = s[31 - l];
  }
}
#define HAND_OVER(bug) BUG_CASE(hand_over, bug, dim3(1), dim3(64), 0, 32, 32)
HAND_OVER(none);
HAND_OVER(missing_arrive);
HAND_OVER(wrong_count);
HAND_OVER(wrong_barrier);
HAND_OVER(missing_sync);
HAND_OVER(half_a_warp);
HAND_OVER(no_such_barrier);
}  // namespace named

namespace launches {
enum class Bug { none, too_many_threads, too_much_shared, too_much_static, empty_grid, grid_too_tall };

template <Bug kBug>
__global__ void copy(const uint32_t* in, uint32_t* out) {
  if (kBug == Bug::too_much_static) {  // beside dynamic memory for which no launch opts in
    FASTLM_SHARED(uint32_t, mine, 2304);
    mine[threadIdx.x] = in[threadIdx.x];
  }
  out[threadIdx.x] = in[threadIdx.x];
}
BUG_CASE(copy, none, dim3(1), dim3(32), 0, 32, 32);
BUG_CASE(copy, too_many_threads, dim3(1), dim3(1056), 0, 32, 32);
BUG_CASE(copy, too_much_shared, dim3(1), dim3(32), 228 * 1024, 32, 32);
BUG_CASE(copy, too_much_static, dim3(1), dim3(32), 40 * 1024, 32, 32);
BUG_CASE(copy, empty_grid, dim3(0), dim3(32), 0, 32, 32);
BUG_CASE(copy, grid_too_tall, dim3(1, 70000), dim3(32), 0, 32, 32);
}  // namespace launches

}  // namespace
