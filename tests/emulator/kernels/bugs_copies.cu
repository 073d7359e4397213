// Mistakes with asynchronous copies: cp.async, mbarrier and TMA.
#include "bugs.h"
#include "common/cuda/ptx_cp_async.h"
#include "common/cuda/ptx_matrix.h"
#include "common/cuda/ptx_mbarrier.h"
#include "common/cuda/ptx_tma.h"

namespace {

using namespace fastlm;

namespace pipeline {
enum class Bug {
  none, missing_wait, wait_too_lenient, missing_sync, missing_sync_before_refill, missing_commit, misaligned_source,
  misaligned_destination, source_past_the_end, shared_too_small, ldmatrix_misaligned, ldmatrix_outside,
};
constexpr int kTiles = 5, kTile = 4 * 64;  // words

// Two buffers, filled by cp.async one tile ahead; each thread writes what another has loaded.
template <Bug kBug>
__global__ void double_buffer(const uint32_t* in, uint32_t* out) {
  FASTLM_SHARED_DYNAMIC(shared, 1024);
  auto* s = reinterpret_cast<uint32_t*>(shared);
  const int t = threadIdx.x;
  auto load = [&](int tile) {
    const uint32_t* from = in + kTile * tile + 4 * t;
    if (kBug == Bug::misaligned_source) from += 1;
    if (kBug == Bug::source_past_the_end && tile == kTiles - 1 && t == 63) from += 4;
    uint32_t to = ptx::shared_address(s + tile % 2 * kTile + 4 * t);
    if (kBug == Bug::misaligned_destination) to += 8;
    ptx::cp_async_16(to, from);
  };
  load(0);
  if (kBug != Bug::missing_commit) ptx::cp_async_commit();
  for (int tile = 0; tile < kTiles; tile++) {
    if (tile + 1 < kTiles) load(tile + 1);
    if (kBug != Bug::missing_commit) ptx::cp_async_commit();
    if (kBug == Bug::wait_too_lenient) ptx::cp_async_wait<2>();
    else if (kBug != Bug::missing_wait) ptx::cp_async_wait<1>();
    if (kBug != Bug::missing_sync) __syncthreads();
    uint32_t r[4];
    uint32_t row = ptx::shared_address(s + tile % 2 * kTile + 4 * ((t + 32) % 64));
    if (kBug == Bug::ldmatrix_misaligned) row += 4;
    if (kBug == Bug::ldmatrix_outside && tile == 4 && t == 9) row += 4 * kTile * 2;
    ptx::ldmatrix<4>(r, row);
    for (int i = 0; i < 4; i++) out[kTile * tile + 64 * i + t] = r[i];
    if (kBug != Bug::missing_sync_before_refill) __syncthreads();
  }
}
#define DOUBLE_BUFFER(bug)                                                                                         \
  BUG_CASE(double_buffer, bug, dim3(1), dim3(64), (Bug::bug == Bug::shared_too_small ? 7 : 8) * kTile, kTiles* kTile, \
           kTiles* kTile)
DOUBLE_BUFFER(none);
DOUBLE_BUFFER(missing_wait);
DOUBLE_BUFFER(wait_too_lenient);
DOUBLE_BUFFER(missing_sync);
DOUBLE_BUFFER(missing_sync_before_refill);
DOUBLE_BUFFER(missing_commit);
DOUBLE_BUFFER(misaligned_source);
DOUBLE_BUFFER(misaligned_destination);
DOUBLE_BUFFER(source_past_the_end);
DOUBLE_BUFFER(shared_too_small);
DOUBLE_BUFFER(ldmatrix_misaligned);
DOUBLE_BUFFER(ldmatrix_outside);
}  // namespace pipeline

namespace ring {
enum class Bug {
  none, wrong_parity, too_many_bytes_expected, too_few_bytes_expected, missing_empty_wait, missing_full_wait, missing_fence,
  not_initialised, initialised_twice, too_many_arrivals, released_too_early, ends_under_way, misaligned_copy,
};
constexpr int kRounds = 6, kWords = 64, kBytes = 4 * kWords;

// A warp loads into two slots by cp.async.bulk, two warps read: full and empty mbarriers.
template <Bug kBug>
__global__ void bulk_ring(const uint32_t* in, uint32_t* out) {
  FASTLM_SHARED_DYNAMIC(s, 1024);
  FASTLM_SHARED(uint64_t, barriers, 4);
  const uint32_t full = ptx::shared_address(barriers), empty = full + 16;
  if (threadIdx.x == 0 && kBug != Bug::not_initialised) {
    for (int i = 0; i < 2; i++) {
      ptx::mbarrier_init(full + 8 * i, 1);
      ptx::mbarrier_init(empty + 8 * i, kBug == Bug::too_many_arrivals ? 32 : 64);
      if (kBug == Bug::initialised_twice) ptx::mbarrier_init(full + 8 * i, 1);
    }
    if (kBug != Bug::missing_fence) ptx::mbarrier_fence_init();
  }
  __syncthreads();
  if (threadIdx.x < 32) {
    if (threadIdx.x != 0) return;
    for (int round = 0; round < kRounds; round++) {
      const int slot = round % 2;
      if (kBug != Bug::missing_empty_wait) ptx::mbarrier_wait(empty + 8 * slot, round / 2 % 2 ^ 1);
      const int more = kBug == Bug::too_many_bytes_expected ? 16 : kBug == Bug::too_few_bytes_expected ? -16 : 0;
      ptx::mbarrier_arrive_expect_tx(full + 8 * slot, kBytes + more);
      const uint32_t to = ptx::shared_address(s) + kBytes * slot;
      ptx::bulk_load(to, in + kWords * round + (kBug == Bug::misaligned_copy ? 1 : 0), kBytes, full + 8 * slot);
    }
  } else {
    const int t = threadIdx.x - 32;
    for (int round = 0; round < kRounds; round++) {
      const int slot = round % 2;
      if (kBug == Bug::ends_under_way && round == kRounds - 1) break;
      if (kBug != Bug::missing_full_wait) {
        ptx::mbarrier_wait(full + 8 * slot, kBug == Bug::wrong_parity ? round / 2 % 2 ^ 1 : round / 2 % 2);
      }
      if (kBug == Bug::released_too_early) ptx::mbarrier_arrive(empty + 8 * slot);
      out[kWords * round + t] = reinterpret_cast<const uint32_t*>(s)[kWords * slot + 63 - t];
      if (kBug != Bug::released_too_early) ptx::mbarrier_arrive(empty + 8 * slot);
    }
  }
}
#define BULK_RING(bug) \
  BUG_CASE(bulk_ring, bug, dim3(1), dim3(96), 2 * kBytes, kWords* kRounds + 1, kWords* kRounds)
BULK_RING(none);
BULK_RING(wrong_parity);
BULK_RING(too_many_bytes_expected);
BULK_RING(too_few_bytes_expected);
BULK_RING(missing_empty_wait);
BULK_RING(missing_full_wait);
BULK_RING(missing_fence);
BULK_RING(not_initialised);
BULK_RING(initialised_twice);
BULK_RING(too_many_arrivals);
BULK_RING(released_too_early);
BULK_RING(ends_under_way);
BULK_RING(misaligned_copy);
}  // namespace ring

namespace stores {
enum class Bug {
  none, missing_proxy_fence, missing_barrier, missing_commit, missing_wait, refilled_before_read, misaligned_tile, wrong_rank,
  tile_outside, past_the_end, before_the_tensor,
};

// Two tiles of 8 x 32 words through one buffer, each stored by TMA.
template <Bug kBug>
__global__ void store_tiles(const __grid_constant__ cuda::TensorMap map, const uint32_t* in) {
  FASTLM_SHARED_DYNAMIC(s, 1024);
  uint32_t tile = ptx::shared_address(s);
  if (kBug == Bug::misaligned_tile) tile += 512;
  if (kBug == Bug::tile_outside) tile += 1024;
  for (int i = 0; i < 2; i++) {
    for (int w = threadIdx.x; w < 256; w += 64) {
      const int piece = w / 4 ^ w / 32 % 8;
      reinterpret_cast<uint32_t*>(s)[4 * piece + w % 4] = in[256 * i + w];
    }
    if (kBug != Bug::missing_proxy_fence) ptx::fence_proxy_async();
    if (kBug != Bug::missing_barrier) __syncthreads();
    if (threadIdx.x == 0) {
      const int at[2] = {0, kBug == Bug::before_the_tensor ? 8 * i - 1 : 8 * i}, at_three[3] = {0, 8 * i, 0};
      kBug == Bug::wrong_rank ? ptx::tma_store(&map, tile, at_three) : ptx::tma_store(&map, tile, at);
      if (kBug != Bug::missing_commit) ptx::bulk_commit();
      const bool last = i == 1;
      if (kBug == Bug::refilled_before_read || (kBug == Bug::missing_wait && last)) {
        if (last && kBug != Bug::missing_wait) ptx::bulk_wait<0>();
      } else {
        ptx::bulk_wait_read<0>();
      }
    }
    __syncthreads();
  }
}
template <Bug kBug>
void run(const uint32_t* in, uint32_t* out) {
  cuda::TensorMapSpec spec{out, cuda::ElementType::f32, 2, {32, 16}, {0, 128}, {32, 8}, cuda::Swizzle::b128};
  if (kBug == Bug::past_the_end) spec.size[1] = 17, spec.box[1] = 9;
  cuda::launch("store_tiles", {dim3(1), dim3(64), kBug == Bug::past_the_end ? 2048 : 1024}, store_tiles<kBug>,
               cuda::make_tensor_map(spec), in);
}
#define STORE_TILES(bug) static const harness::Register store_tiles_##bug("store_tiles/" #bug, 512, 512, run<Bug::bug>)
STORE_TILES(none);
STORE_TILES(missing_proxy_fence);
STORE_TILES(missing_barrier);
STORE_TILES(missing_commit);
STORE_TILES(missing_wait);
STORE_TILES(refilled_before_read);
STORE_TILES(misaligned_tile);
STORE_TILES(wrong_rank);
STORE_TILES(tile_outside);
STORE_TILES(past_the_end);
STORE_TILES(before_the_tensor);
}  // namespace stores

}  // namespace
