// ldmatrix, stmatrix, mma.sync and cp.async: one kernel a wrapper.
#include "common/cuda/ptx_cp_async.h"
#include "common/cuda/ptx_matrix.h"
#include "common/cuda/ptx_mbarrier.h"
#include "harness.h"

namespace {

using namespace fastlm;

// in: four 8x8 matrices of 16-bit elements, one after the other, rows of 16 bytes.
template <int kCount, bool kTransposed>
__global__ void load_matrices(const uint32_t* in, uint32_t* out) {
  FASTLM_SHARED(uint4, s, 32);
  const int l = threadIdx.x;
  s[l] = reinterpret_cast<const uint4*>(in)[l];
  __syncthreads();
  uint32_t r[kCount];
  ptx::ldmatrix<kCount, kTransposed>(r, ptx::shared_address(s + l % (8 * kCount)));
  for (int i = 0; i < kCount; i++) out[32 * i + l] = r[i];
}
#define LDMATRIX(name, count, transposed)                                                               \
  static const harness::Register ldmatrix_##count##_##transposed(name, 128, 32 * count, [](const uint32_t* in, uint32_t* out) { \
    cuda::launch(name, {dim3(1), dim3(32)}, load_matrices<count, transposed>, in, out);                 \
  })
LDMATRIX("ldmatrix_1", 1, false);
LDMATRIX("ldmatrix_2", 2, false);
LDMATRIX("ldmatrix_4", 4, false);
LDMATRIX("ldmatrix_1_transposed", 1, true);
LDMATRIX("ldmatrix_2_transposed", 2, true);
LDMATRIX("ldmatrix_4_transposed", 4, true);

template <int kCount, bool kTransposed>
__global__ void store_matrices(const uint32_t* in, uint32_t* out) {
  FASTLM_SHARED(uint4, s, 32);
  const int l = threadIdx.x;
  uint32_t r[kCount];
  for (int i = 0; i < kCount; i++) r[i] = in[32 * i + l];
  ptx::stmatrix<kCount, kTransposed>(ptx::shared_address(s + l % (8 * kCount)), r);
  __syncthreads();
  if (l < 8 * kCount) reinterpret_cast<uint4*>(out)[l] = s[l];
}
#define STMATRIX(name, count, transposed)                                                                       \
  static const harness::Register stmatrix_##count##_##transposed(name, 128, 32 * count, [](const uint32_t* in, uint32_t* out) { \
    cuda::launch(name, {dim3(1), dim3(32)}, store_matrices<count, transposed>, in, out);                        \
  })
STMATRIX("stmatrix_1", 1, false);
STMATRIX("stmatrix_2", 2, false);
STMATRIX("stmatrix_4", 4, false);
STMATRIX("stmatrix_1_transposed", 1, true);
STMATRIX("stmatrix_2_transposed", 2, true);
STMATRIX("stmatrix_4_transposed", 4, true);

// in: a (4 words a lane), b (2), d (4).
template <int kType>
__global__ void multiply(const uint32_t* in, uint32_t* out) {
  const int l = threadIdx.x;
  const uint32_t a[4] = {in[4 * l], in[4 * l + 1], in[4 * l + 2], in[4 * l + 3]};
  float d[4];
  for (int i = 0; i < 4; i++) d[i] = __uint_as_float(in[192 + 4 * l + i]);
  if constexpr (kType == 0) ptx::mma_bf16(d, a, in[128 + 2 * l], in[128 + 2 * l + 1]);
  if constexpr (kType == 1) ptx::mma_f16(d, a, in[128 + 2 * l], in[128 + 2 * l + 1]);
  if constexpr (kType == 2) ptx::mma_tf32(d, a, in[128 + 2 * l], in[128 + 2 * l + 1]);
  for (int i = 0; i < 4; i++) out[4 * l + i] = __float_as_uint(d[i]);
}
#define MMA(name, type)                                                                       \
  static const harness::Register mma_##type(name, 320, 128, [](const uint32_t* in, uint32_t* out) { \
    cuda::launch(name, {dim3(1), dim3(32)}, multiply<type>, in, out);                         \
  })
MMA("mma_bf16", 0);
MMA("mma_f16", 1);
MMA("mma_tf32", 2);

// Lane l copies l % 17 bytes of 16; the rest is zero.
__global__ void copy_partly(const uint32_t* in, uint32_t* out) {
  FASTLM_SHARED(uint4, s, 32);
  const int l = threadIdx.x;
  ptx::cp_async_16(ptx::shared_address(s + l), in + 4 * l, l % 17);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();
  reinterpret_cast<uint4*>(out)[l] = s[31 - l];
}
HARNESS_CASE("cp_async_16_partly", copy_partly, 1, 32, 0, 128, 128);

// Every third lane gets zeros.
__global__ void copy_if(const uint32_t* in, uint32_t* out) {
  FASTLM_SHARED(uint4, s, 32);
  const int l = threadIdx.x;
  ptx::cp_async_16_if(l % 3 != 0, ptx::shared_address(s + l), in + 4 * l);
  ptx::cp_async_wait_all();
  __syncthreads();
  reinterpret_cast<uint4*>(out)[l] = s[31 - l];
}
HARNESS_CASE("cp_async_16_if", copy_if, 1, 32, 0, 128, 128);

__global__ void copy_small(const uint32_t* in, uint32_t* out) {
  FASTLM_SHARED(uint2, s, 64);
  const int l = threadIdx.x;
  ptx::cp_async_small<8>(ptx::shared_address(s + l), in + 2 * l);
  ptx::cp_async_small<4>(ptx::shared_address(s + 32 + l), in + 64 + 2 * l, l % 2 * 4);
  ptx::cp_async_small<4>(ptx::shared_address(s + 32 + l) + 4, in + 64 + 2 * l + 1);
  ptx::cp_async_wait_all();
  __syncthreads();
  reinterpret_cast<uint2*>(out)[l] = s[31 - l];
  reinterpret_cast<uint2*>(out)[32 + l] = s[63 - l];
}
HARNESS_CASE("cp_async_small", copy_small, 1, 32, 0, 128, 128);

// Three stages, as a GEMM's main loop has them.
__global__ void copy_pipeline(const uint32_t* in, uint32_t* out) {
  FASTLM_SHARED(uint4, s, 3 * 64);
  const int t = threadIdx.x;
  constexpr int kTiles = 7;
  auto load = [&](int tile) {
    if (tile < kTiles) ptx::cp_async_16(ptx::shared_address(s + tile % 3 * 64 + t), in + 4 * (64 * tile + t));
    ptx::cp_async_commit();
  };
  load(0);
  load(1);
  for (int tile = 0; tile < kTiles; tile++) {
    ptx::cp_async_wait<1>();
    __syncthreads();
    load(tile + 2);
    reinterpret_cast<uint4*>(out)[64 * tile + t] = s[tile % 3 * 64 + 63 - t];
  }
}
HARNESS_CASE("cp_async_pipeline", copy_pipeline, 1, 64, 0, 1792, 1792);

// An mbarrier counts the threads whose copies are done.
__global__ void copy_to_mbarrier(const uint32_t* in, uint32_t* out) {
  FASTLM_SHARED(uint4, s, 64);
  FASTLM_SHARED(uint64_t, full, 1);
  const int t = threadIdx.x;
  const uint32_t barrier = ptx::shared_address(full);
  if (t == 0) ptx::mbarrier_init(barrier, 64);
  ptx::mbarrier_fence_init();
  __syncthreads();
  ptx::cp_async_16(ptx::shared_address(s + t), in + 4 * t);
  ptx::cp_async_mbarrier_arrive(barrier);
  ptx::mbarrier_wait(barrier, 0);
  reinterpret_cast<uint4*>(out)[t] = s[63 - t];
}
HARNESS_CASE("cp_async_mbarrier", copy_to_mbarrier, 1, 64, 0, 256, 256);

}  // namespace
