// Clusters: ranks, distributed shared memory, remote mbarriers, multicast; and programmatic dependent launch.
#include "common/cuda/ptx_cluster.h"
#include "common/cuda/ptx_grid.h"
#include "common/cuda/ptx_mbarrier.h"
#include "common/cuda/ptx_tma.h"
#include "harness.h"

namespace {

using namespace fastlm;

#define CLUSTER_CASE(name, kernel, grid, cluster, threads, shared, in_words, out_words)                             \
  static const harness::Register kernel##_case(name, in_words, out_words, [](const uint32_t* in, uint32_t* out) { \
    cuda::launch(name, {grid, dim3(threads), shared, nullptr, cluster}, kernel, in, out);                         \
  })

__global__ void ranks(const uint32_t*, uint32_t* out) {
  const int block = blockIdx.x + 4 * blockIdx.y;
  if (threadIdx.x == 0) out[block] = ptx::cluster_rank();
  if (threadIdx.x == 1) out[8 + block] = ptx::cluster_size();
}
CLUSTER_CASE("cluster_ranks", ranks, dim3(4, 2), dim3(2, 2), 32, 0, 0, 16);

// Every block reads what the next one of its cluster has written, and writes into the one after that.
__global__ void neighbours(const uint32_t* in, uint32_t* out) {
  FASTLM_SHARED(uint32_t, mine, 32);
  FASTLM_SHARED(uint32_t, given, 32);
  const int t = threadIdx.x, n = ptx::cluster_size();
  const uint32_t next = (ptx::cluster_rank() + 1) % n, after = (ptx::cluster_rank() + 2) % n;
  mine[t] = in[32 * blockIdx.x + t];
  ptx::cluster_arrive();
  ptx::cluster_wait();
  out[64 * blockIdx.x + t] = ptx::load_cluster(ptx::map_shared(ptx::shared_address(mine + 31 - t), next));
  ptx::store_cluster(ptx::map_shared(ptx::shared_address(given + t), after), 3 * mine[t]);
  ptx::cluster_arrive();
  ptx::cluster_wait();
  out[64 * blockIdx.x + 32 + t] = given[t];
}
CLUSTER_CASE("distributed_shared_memory", neighbours, dim3(8), dim3(4), 32, 0, 256, 512);

// A store that an mbarrier of its destination counts, and an arrival on another block's mbarrier.
__global__ void remote_barriers(const uint32_t* in, uint32_t* out) {
  FASTLM_SHARED(uint32_t, given, 32);
  FASTLM_SHARED(uint64_t, barriers, 2);
  const int t = threadIdx.x;
  const uint32_t peer = ptx::cluster_rank() ^ 1, landed = ptx::shared_address(barriers), read = landed + 8;
  if (t == 0) {
    ptx::mbarrier_init(landed, 1);
    ptx::mbarrier_init(read, 32);
    ptx::mbarrier_fence_init();
    ptx::mbarrier_arrive_expect_tx(landed, 128);
  }
  ptx::cluster_arrive();
  ptx::cluster_wait();
  ptx::store_cluster_async(ptx::map_shared(ptx::shared_address(given + t), peer), in[32 * blockIdx.x + t],
                           ptx::map_shared(landed, peer));
  ptx::mbarrier_wait(landed, 0);
  out[32 * blockIdx.x + t] = given[31 - t];
  ptx::mbarrier_arrive_cluster(ptx::map_shared(read, peer));
  ptx::mbarrier_wait(read, 0);
  ptx::cluster_arrive_relaxed();
  ptx::cluster_wait();
}
CLUSTER_CASE("remote_mbarriers", remote_barriers, dim3(4), dim3(2), 32, 0, 128, 128);

// Each of two blocks loads half of a tile and sends it to both.
__global__ void multicast(const __grid_constant__ cuda::TensorMap map, uint32_t* out) {
  FASTLM_SHARED_DYNAMIC(s, 1024);
  FASTLM_SHARED(uint64_t, full, 1);
  const uint32_t barrier = ptx::shared_address(full), rank = ptx::cluster_rank();
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier, 1);
    ptx::mbarrier_fence_init();
    ptx::mbarrier_arrive_expect_tx(barrier, 1024);
  }
  ptx::cluster_arrive();
  ptx::cluster_wait();
  if (threadIdx.x == 0) {
    const int at[2] = {0, static_cast<int>(4 * rank)};
    ptx::tma_load_multicast(ptx::shared_address(s) + 512 * rank, &map, barrier, at, 3);
  }
  ptx::mbarrier_wait(barrier, 0);
  for (int i = threadIdx.x; i < 256; i += blockDim.x) out[256 * blockIdx.x + i] = reinterpret_cast<uint32_t*>(s)[i];
  ptx::cluster_arrive_relaxed();
  ptx::cluster_wait();
}
const harness::Register multicast_case("tma_multicast", 256, 512, [](const uint32_t* in, uint32_t* out) {
  const cuda::TensorMapSpec spec{in, cuda::ElementType::f32, 2, {32, 8}, {0, 128}, {32, 4}, cuda::Swizzle::none};
  cuda::launch("tma_multicast", {dim3(2), dim3(64), 1024, nullptr, dim3(2)}, multicast, cuda::make_tensor_map(spec), out);
});

__global__ void first_kernel(const uint32_t* in, uint32_t* out) {
  ptx::grid_launch_dependents();
  out[threadIdx.x] = in[threadIdx.x] + 1;
}
__global__ void second_kernel(uint32_t* out) {
  ptx::grid_dependency_wait();
  out[32 + threadIdx.x] = 2 * out[31 - threadIdx.x];
}
const harness::Register dependent_launch("programmatic_launch", 32, 64, [](const uint32_t* in, uint32_t* out) {
  cuda::launch("first_kernel", {dim3(1), dim3(32)}, first_kernel, in, out);
  cuda::launch("second_kernel", {dim3(1), dim3(32), 0, nullptr, dim3(1), true}, second_kernel, out);
});

}  // namespace
