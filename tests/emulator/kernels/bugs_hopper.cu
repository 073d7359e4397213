// Mistakes with wgmma, warp specialisation, clusters and dependent launches.
#include "bugs.h"
#include "common/cuda/ptx_barrier.h"
#include "common/cuda/ptx_cluster.h"
#include "common/cuda/ptx_grid.h"
#include "common/cuda/ptx_mbarrier.h"
#include "common/cuda/ptx_tma.h"
#include "common/cuda/ptx_warpgroup.h"
#include "common/cuda/ptx_wgmma.h"

namespace {

using namespace fastlm;

namespace gemm {
enum class Bug {
  none, missing_wgmma_fence, missing_commit, missing_wait, wait_too_lenient, released_before_wait, wrong_stride,
  wrong_swizzle, wrong_step, missing_full_wait, missing_empty_wait, wrong_bytes, missing_store_fence, missing_store_barrier,
  a_warp_skips, registers_out, registers_more_by_dec, descriptor_outside, base_offset,
};

// c (128 x 64, bf16) = a (128 x k) b (64 x k)^T: one warpgroup loads by TMA into three stages, two multiply.
constexpr int kDepth = 64, kStages = 3, kSteps = 5;
constexpr int kABytes = 128 * kDepth * 2, kBBytes = 64 * kDepth * 2, kCBytes = 64 * 64 * 2;
constexpr int kShared = kStages * (kABytes + kBBytes) + 2 * kCBytes;
constexpr int kK = kDepth * kSteps;

template <Bug kBug>
__global__ void __launch_bounds__(384, 1) tma_gemm(const __grid_constant__ cuda::TensorMap a_map, const __grid_constant__ cuda::TensorMap b_map,
                                                  const __grid_constant__ cuda::TensorMap c_map) {
  FASTLM_SHARED_DYNAMIC(s, 1024);
  FASTLM_SHARED(uint64_t, barriers, 2 * kStages);
  const uint32_t a_tiles = ptx::shared_address(s), b_tiles = a_tiles + kStages * kABytes;
  const uint32_t c_tiles = b_tiles + kStages * kBBytes;
  const uint32_t full = ptx::shared_address(barriers), empty = full + 8 * kStages;
  const int group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; i++) {
      ptx::mbarrier_init(full + 8 * i, 1);
      ptx::mbarrier_init(empty + 8 * i, 8);  // one arrival of each consumer warp
    }
    ptx::mbarrier_fence_init();
  }
  __syncthreads();
  if (group == 0) {
    if (kBug == Bug::registers_more_by_dec) ptx::setmaxnreg_decrease<232>();
    else ptx::setmaxnreg_decrease<40>();
    if (warp == 0 && ptx::elect_one()) {
      for (int step = 0; step < kSteps; step++) {
        const int stage = step % kStages;
        if (kBug != Bug::missing_empty_wait) ptx::mbarrier_wait(empty + 8 * stage, step / kStages % 2 ^ 1);
        ptx::mbarrier_arrive_expect_tx(full + 8 * stage, kABytes + kBBytes + (kBug == Bug::wrong_bytes ? 16 : 0));
        const int at[2] = {kDepth * step, 0};
        ptx::tma_load(a_tiles + stage * kABytes, &a_map, full + 8 * stage, at);
        ptx::tma_load(b_tiles + stage * kBBytes, &b_map, full + 8 * stage, at);
      }
    }
    return;
  }
  if (kBug == Bug::registers_out) ptx::setmaxnreg_increase<240>();
  else ptx::setmaxnreg_increase<232>();
  const int half = group - 1;  // of the 128 rows
  float d[32];
  for (int step = 0; step < kSteps; step++) {
    const int stage = step % kStages;
    if (kBug != Bug::missing_full_wait) ptx::mbarrier_wait(full + 8 * stage, step / kStages % 2);
    if (kBug != Bug::missing_wgmma_fence) ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; k++) {
      if (kBug == Bug::a_warp_skips && warp == 2 && step == 1 && k == 3) continue;
      const uint32_t a = a_tiles + stage * kABytes + half * 64 * 128 + 32 * k;
      uint32_t b = b_tiles + stage * kBBytes + (kBug == Bug::wrong_step ? 64 * k : 32 * k);
      if (kBug == Bug::descriptor_outside) b += kShared;
      const uint32_t stride = kBug == Bug::wrong_stride ? 512 : 1024;
      const auto swizzle = kBug == Bug::wrong_swizzle ? cuda::Swizzle::b64 : cuda::Swizzle::b128;
      uint64_t b_descriptor = ptx::wgmma_descriptor(b, 16, stride, swizzle);
      if (kBug == Bug::base_offset) b_descriptor |= uint64_t{1} << 49;
      ptx::Wgmma<64, ptx::WgmmaType::bf16>::ss<>(d, ptx::wgmma_descriptor(a, 16, 1024, cuda::Swizzle::b128), b_descriptor,
                                                 step + k > 0);
    }
    if (kBug != Bug::missing_commit) ptx::wgmma_commit();
    if (kBug == Bug::released_before_wait && lane == 0) ptx::mbarrier_arrive(empty + 8 * stage);
    ptx::wgmma_wait<1>();
    if (kBug != Bug::released_before_wait && step > 0 && lane == 0) ptx::mbarrier_arrive(empty + 8 * ((step - 1) % kStages));
  }
  if (kBug == Bug::wait_too_lenient) ptx::wgmma_wait<1>();
  else if (kBug != Bug::missing_wait) ptx::wgmma_wait<0>();
  auto* c = s + (c_tiles - a_tiles) + half * kCBytes;
  for (int j = 0; j < 8; j++) {
    for (int h = 0; h < 2; h++) {
      const int row = 16 * warp + lane / 4 + 8 * h;
      const auto v = __floats2bfloat162_rn(d[4 * j + 2 * h], d[4 * j + 2 * h + 1]);
      *reinterpret_cast<__nv_bfloat162*>(c + 128 * row + 16 * (j ^ row % 8) + lane % 4 * 4) = v;
    }
  }
  if (kBug != Bug::missing_store_fence) ptx::fence_proxy_async();
  if (kBug != Bug::missing_store_barrier) ptx::barrier_sync(1 + half, 128);
  if (threadIdx.x % 128 == 0) {
    const int at[2] = {0, 64 * half};
    ptx::tma_store(&c_map, c_tiles + half * kCBytes, at);
    ptx::bulk_commit();
    ptx::bulk_wait<0>();
  }
}

cuda::TensorMap map_of(const void* base, int rows, int columns, int box_rows) {
  const auto r = static_cast<uint64_t>(rows), c = static_cast<uint64_t>(columns);
  return cuda::make_tensor_map({base, cuda::ElementType::bf16, 2, {c, r}, {0, 2 * c}, {64, static_cast<uint32_t>(box_rows)},
                                cuda::Swizzle::b128});
}
template <Bug kBug>
void run(const uint32_t* in, uint32_t* out) {
  cuda::launch("tma_gemm", {dim3(1), dim3(384), kShared}, tma_gemm<kBug>, map_of(in, 128, kK, 128),
               map_of(in + 128 * kK / 2, 64, kK, 64), map_of(out, 128, 64, 64));
}
#define TMA_GEMM(bug) static const harness::Register tma_gemm_##bug("tma_gemm/" #bug, 192 * kK / 2, 128 * 64 / 2, run<Bug::bug>)
TMA_GEMM(none);
TMA_GEMM(missing_wgmma_fence);
TMA_GEMM(missing_commit);
TMA_GEMM(missing_wait);
TMA_GEMM(wait_too_lenient);
TMA_GEMM(released_before_wait);
TMA_GEMM(wrong_stride);
TMA_GEMM(wrong_swizzle);
TMA_GEMM(wrong_step);
TMA_GEMM(missing_full_wait);
TMA_GEMM(missing_empty_wait);
TMA_GEMM(wrong_bytes);
TMA_GEMM(missing_store_fence);
TMA_GEMM(missing_store_barrier);
TMA_GEMM(a_warp_skips);
TMA_GEMM(registers_out);
TMA_GEMM(registers_more_by_dec);
TMA_GEMM(descriptor_outside);
TMA_GEMM(base_offset);
}  // namespace gemm

namespace clusters {
enum class Bug {
  none, missing_first_barrier, missing_barrier, exits_too_early, no_such_block, wait_without_arrive, arrives_twice,
  not_whole_clusters, nothing_published,
};

// Each block of two reads what the other has written.
template <Bug kBug>
__global__ void swap_in_pairs(const uint32_t* in, uint32_t* out) {
  FASTLM_SHARED(uint32_t, mine, 32);
  const uint32_t t = threadIdx.x, peer = kBug == Bug::no_such_block ? 2 : ptx::cluster_rank() ^ 1;
  if (kBug != Bug::missing_first_barrier) {
    if (kBug != Bug::wait_without_arrive) ptx::cluster_arrive();
    if (kBug == Bug::arrives_twice) ptx::cluster_arrive();
    ptx::cluster_wait();
  }
  mine[t] = in[32 * blockIdx.x + t];
  if (kBug != Bug::missing_barrier && kBug != Bug::missing_first_barrier) {
    kBug == Bug::nothing_published ? ptx::cluster_arrive_relaxed() : ptx::cluster_arrive();
    ptx::cluster_wait();
  }
  if (kBug == Bug::exits_too_early && ptx::cluster_rank() == 1) return;
  const uint32_t v = ptx::load_cluster(ptx::map_shared(ptx::shared_address(mine + 31 - t), peer));
  out[32 * blockIdx.x + t] = v;
  if (kBug == Bug::exits_too_early) return;
  ptx::cluster_arrive();
  ptx::cluster_wait();
}
#define SWAP_IN_PAIRS(bug) \
  CLUSTER_BUG_CASE(swap_in_pairs, bug, dim3(Bug::bug == Bug::not_whole_clusters ? 3 : 4), dim3(32), dim3(2), 128, 128)
SWAP_IN_PAIRS(none);
SWAP_IN_PAIRS(missing_first_barrier);
SWAP_IN_PAIRS(missing_barrier);
SWAP_IN_PAIRS(exits_too_early);
SWAP_IN_PAIRS(no_such_block);
SWAP_IN_PAIRS(wait_without_arrive);
SWAP_IN_PAIRS(arrives_twice);
SWAP_IN_PAIRS(not_whole_clusters);
SWAP_IN_PAIRS(nothing_published);
}  // namespace clusters

namespace dependent {
enum class Bug { none, missing_wait };

template <Bug kBug>
__global__ void depends(const uint32_t* in, uint32_t* out) {
  if (kBug != Bug::missing_wait) ptx::grid_dependency_wait();
  out[threadIdx.x] = in[threadIdx.x];
}
template <Bug kBug>
void run(const uint32_t* in, uint32_t* out) {
  cuda::launch("depends", {dim3(1), dim3(32), 0, nullptr, dim3(1), true}, depends<kBug>, in, out);
}
const harness::Register depends_none("depends/none", 32, 32, run<Bug::none>);
const harness::Register depends_missing_wait("depends/missing_wait", 32, 32, run<Bug::missing_wait>);
}  // namespace dependent

}  // namespace
