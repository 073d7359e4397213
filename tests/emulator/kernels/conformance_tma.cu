// TMA of every rank and swizzle, bulk copies and mbarriers. The tensors and boxes stand once more in conformance.py.
#include "common/cuda/ptx_mbarrier.h"
#include "common/cuda/ptx_tma.h"
#include "harness.h"

namespace {

using namespace fastlm;
using cuda::ElementType;
using cuda::Swizzle;
using cuda::TensorMap;

constexpr uint64_t kSizes[5] = {0, 5, 4, 3, 3};  // of dimensions 1 to 4; dimension 0: the box and 16 bytes more
constexpr uint32_t kBox[5] = {0, 3, 2, 2, 2};
constexpr int kInside[5] = {0, 1, 1, 0, 1};
constexpr int kOverhanging[5] = {8, 3, -1, 2, 2};  // partly outside in every dimension
constexpr int kStored[5] = {8, 3, 3, 2, 2};        // the same; a store must not begin before the tensor

constexpr uint32_t row_bytes(Swizzle s) { return s == Swizzle::b128 ? 128 : s == Swizzle::b64 ? 64 : 32; }

template <int kRank>
constexpr int box_words(Swizzle s) {
  int n = row_bytes(s) / 4;
  for (int d = 1; d < kRank; d++) n *= kBox[d];
  return n;
}
template <int kRank>
constexpr int tensor_words(Swizzle s) {
  int n = (row_bytes(s) + 16) / 4;
  for (int d = 1; d < kRank; d++) n *= static_cast<int>(kSizes[d]);
  return n;
}

template <int kRank>
TensorMap map_of(const void* base, Swizzle swizzle, ElementType type, bool fill_nan = false) {
  const uint32_t size = static_cast<uint32_t>(cuda::size_of(type));
  cuda::TensorMapSpec spec{base, type, kRank, {(row_bytes(swizzle) + 16) / size}, {}, {row_bytes(swizzle) / size}, swizzle, fill_nan};
  uint64_t stride = row_bytes(swizzle) + 16;
  for (int d = 1; d < kRank; d++) {
    spec.size[d] = kSizes[d];
    spec.box[d] = kBox[d];
    spec.stride_bytes[d] = stride;
    stride *= kSizes[d];
  }
  return cuda::make_tensor_map(spec);
}

struct At {
  int c[5];
};

constexpr int kTile = 4096;  // bytes between two tiles in shared memory

// Two boxes on one mbarrier; out: the two tiles as they lie in shared memory.
template <int kRank>
__global__ void load_boxes(const __grid_constant__ TensorMap map, At first, At second, int words, uint32_t* out) {
  FASTLM_SHARED_DYNAMIC(s, 1024);
  FASTLM_SHARED(uint64_t, full, 1);
  const uint32_t tile = ptx::shared_address(s), barrier = ptx::shared_address(full);
  if (threadIdx.x == 0) {
    ptx::prefetch_tensor_map(&map);
    ptx::mbarrier_init(barrier, 1);
    ptx::mbarrier_fence_init();
    ptx::mbarrier_arrive_expect_tx(barrier, 8 * words);
    int a[kRank], b[kRank];
    for (int d = 0; d < kRank; d++) {
      a[d] = first.c[d];
      b[d] = second.c[d];
    }
    ptx::tma_load(tile, &map, barrier, a);
    ptx::tma_load(tile + kTile, &map, barrier, b);
  }
  __syncthreads();
  ptx::mbarrier_wait(barrier, 0);
  for (int i = threadIdx.x; i < words; i += blockDim.x) {
    out[i] = reinterpret_cast<const uint32_t*>(s)[i];
    out[words + i] = reinterpret_cast<const uint32_t*>(s + kTile)[i];
  }
}

// in: the tile as it lies in shared memory; stored, or added, to `map` at a place that hangs over.
template <int kRank>
__global__ void store_box(const __grid_constant__ TensorMap map, At at, int words, bool add, const uint32_t* in) {
  FASTLM_SHARED_DYNAMIC(s, 1024);
  for (int i = threadIdx.x; i < words; i += blockDim.x) reinterpret_cast<uint32_t*>(s)[i] = in[i];
  ptx::fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    int c[kRank];
    for (int d = 0; d < kRank; d++) c[d] = at.c[d];
    add ? ptx::tma_reduce_add(&map, ptx::shared_address(s), c) : ptx::tma_store(&map, ptx::shared_address(s), c);
    ptx::bulk_commit();
    ptx::bulk_wait<0>();
  }
}

At coordinates(const int (&c)[5], uint32_t element_size) {
  return {{c[0] * 2 / static_cast<int>(element_size), c[1], c[2], c[3], c[4]}};
}

template <int kRank, Swizzle kSwizzle>
void run_load(const uint32_t* in, uint32_t* out) {
  cuda::launch("tma_load", {dim3(1), dim3(64), 2 * kTile}, load_boxes<kRank>,
               map_of<kRank>(in, kSwizzle, ElementType::u16), coordinates(kInside, 2), coordinates(kOverhanging, 2),
               box_words<kRank>(kSwizzle), out);
}
template <int kRank, Swizzle kSwizzle>
void run_store(const uint32_t* in, uint32_t* out) {
  cuda::launch("tma_store", {dim3(1), dim3(64), kTile}, store_box<kRank>, map_of<kRank>(out, kSwizzle, ElementType::u16),
               coordinates(kStored, 2), box_words<kRank>(kSwizzle), false, in);
}
template <int kRank, Swizzle kSwizzle>
void run_reduce(const uint32_t* in, uint32_t* out) {
  cuda::launch("tma_reduce_add", {dim3(3), dim3(64), kTile}, store_box<kRank>, map_of<kRank>(out, kSwizzle, ElementType::f32),
               coordinates(kStored, 4), box_words<kRank>(kSwizzle), true, in);
}

#define TMA(rank, swizzle)                                                                                            \
  static const harness::Register load_##rank##swizzle("tma_load_" #rank "_" #swizzle, tensor_words<rank>(Swizzle::swizzle),  \
                                                      2 * box_words<rank>(Swizzle::swizzle), run_load<rank, Swizzle::swizzle>); \
  static const harness::Register store_##rank##swizzle("tma_store_" #rank "_" #swizzle, box_words<rank>(Swizzle::swizzle),   \
                                                       tensor_words<rank>(Swizzle::swizzle), run_store<rank, Swizzle::swizzle>); \
  static const harness::Register reduce_##rank##swizzle("tma_reduce_" #rank "_" #swizzle, box_words<rank>(Swizzle::swizzle), \
                                                        tensor_words<rank>(Swizzle::swizzle), run_reduce<rank, Swizzle::swizzle>)
#define TMA_RANK(rank) \
  TMA(rank, none);     \
  TMA(rank, b32);      \
  TMA(rank, b64);      \
  TMA(rank, b128)
TMA_RANK(1);
TMA_RANK(2);
TMA_RANK(3);
TMA_RANK(4);
TMA_RANK(5);

void run_fill_nan(const uint32_t* in, uint32_t* out) {
  cuda::launch("tma_fill_nan", {dim3(1), dim3(64), 2 * kTile}, load_boxes<2>,
               map_of<2>(in, Swizzle::none, ElementType::f32, true), coordinates(kInside, 4), coordinates(kOverhanging, 4),
               box_words<2>(Swizzle::none), out);
}
const harness::Register fill_nan("tma_fill_nan", tensor_words<2>(Swizzle::none), 2 * box_words<2>(Swizzle::none), run_fill_nan);

// Loads 1 KiB, doubles it, stores it and adds it to what is behind.
__global__ void bulk_copies(const uint32_t* in, uint32_t* out) {
  FASTLM_SHARED_DYNAMIC(s, 1024);
  FASTLM_SHARED(uint64_t, full, 1);
  const uint32_t tile = ptx::shared_address(s), barrier = ptx::shared_address(full);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier, 1);
    ptx::mbarrier_fence_init();
    ptx::mbarrier_arrive_expect_tx(barrier, 1024);
    ptx::bulk_load(tile, in, 1024, barrier);
  }
  __syncthreads();
  ptx::mbarrier_wait(barrier, 0);
  for (int i = threadIdx.x; i < 256; i += blockDim.x) reinterpret_cast<float*>(s)[i] *= 2;
  ptx::fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::bulk_store(out, tile, 1024);
    ptx::bulk_commit();
    ptx::bulk_reduce_add_f32(reinterpret_cast<float*>(out) + 256, tile, 1024);
    ptx::bulk_commit();
    ptx::bulk_wait_read<1>();
    ptx::bulk_wait_read<0>();
    ptx::bulk_wait<0>();
  }
}
HARNESS_CASE("bulk_copies", bulk_copies, 1, 64, 1024, 256, 512);

// A ring of two slots: one warp loads, three compute; full and empty barriers, eight rounds.
__global__ void mbarrier_pipeline(const uint32_t* in, uint32_t* out) {
  FASTLM_SHARED_DYNAMIC(s, 1024);
  FASTLM_SHARED(uint64_t, barriers, 4);
  const uint32_t full = ptx::shared_address(barriers), empty = full + 16;
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; i++) {
      ptx::mbarrier_init(full + 8 * i, 1);
      ptx::mbarrier_init(empty + 8 * i, 96);
    }
    ptx::mbarrier_fence_init();
  }
  __syncthreads();
  if (threadIdx.x < 32) {
    if (threadIdx.x != 0) return;
    for (int round = 0; round < 8; round++) {
      const int slot = round % 2;
      ptx::mbarrier_wait(empty + 8 * slot, round / 2 % 2 ^ 1);
      ptx::mbarrier_expect_tx(full + 8 * slot, 384);
      ptx::bulk_load(ptx::shared_address(s) + 384 * slot, in + 96 * round, 384, full + 8 * slot);
      ptx::mbarrier_arrive(full + 8 * slot);
    }
  } else {
    const int t = threadIdx.x - 32;
    for (int round = 0; round < 8; round++) {
      const int slot = round % 2;
      while (!ptx::mbarrier_test_wait(full + 8 * slot, round / 2 % 2)) {
      }
      out[96 * round + t] = reinterpret_cast<const uint32_t*>(s + 384 * slot)[95 - t];
      ptx::mbarrier_arrive(empty + 8 * slot);
    }
  }
}
HARNESS_CASE("mbarrier_pipeline", mbarrier_pipeline, 1, 128, 768, 768, 768);

__global__ void mbarrier_again(const uint32_t* in, uint32_t* out) {
  FASTLM_SHARED(uint64_t, barrier, 1);
  const uint32_t b = ptx::shared_address(barrier);
  for (int round = 0; round < 2; round++) {
    if (threadIdx.x == 0) ptx::mbarrier_init(b, 32);
    ptx::mbarrier_fence_init();
    __syncthreads();
    ptx::mbarrier_arrive(b);
    ptx::mbarrier_wait(b, 0);
    __syncthreads();
    if (threadIdx.x == 0) ptx::mbarrier_invalidate(b);
    __syncthreads();
    out[32 * round + threadIdx.x] = in[threadIdx.x];
  }
}
HARNESS_CASE("mbarrier_invalidate", mbarrier_again, 1, 32, 0, 32, 64);

}  // namespace
