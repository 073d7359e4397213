// Warp instructions, barriers within a block and conversions: one kernel a wrapper.
#include "common/cuda/ptx_barrier.h"
#include "common/cuda/ptx_math.h"
#include "common/cuda/ptx_memory.h"
#include "common/cuda/ptx_warpgroup.h"
#include "harness.h"

namespace {

using namespace fastlm;

__global__ void shuffles(const uint32_t* in, uint32_t* out) {
  const int l = threadIdx.x;
  const uint32_t v = in[l];
  out[l] = __shfl_sync(0xffffffffu, v, (l * 7 + 3) % 32);
  out[32 + l] = __shfl_xor_sync(0xffffffffu, v, 5);
  out[64 + l] = __shfl_down_sync(0xffffffffu, v, 3);
  out[96 + l] = __shfl_up_sync(0xffffffffu, v, 3);
  out[128 + l] = __shfl_sync(0xffffffffu, v, l + 1, 8);
  out[160 + l] = __shfl_down_sync(0xffffffffu, v, 3, 8);
}
HARNESS_CASE("shuffles", shuffles, 1, 32, 0, 32, 192);

__global__ void votes(const uint32_t* in, uint32_t* out) {
  const int l = threadIdx.x;
  const uint32_t v = in[l];
  out[l] = __ballot_sync(0xffffffffu, v & 1);
  out[32 + l] = __any_sync(0xffffffffu, v > 0xfffffff0u);
  out[64 + l] = __all_sync(0xffffffffu, v < 0xffffffffu);
  out[96 + l] = __match_any_sync(0xffffffffu, v % 4);
  if (l < 16) out[128 + l] = __ballot_sync(0xffffu, v & 2);
}
HARNESS_CASE("votes", votes, 1, 32, 0, 32, 144);

__global__ void reductions(const uint32_t* in, uint32_t* out) {
  const int l = threadIdx.x;
  const uint32_t v = in[l];
  out[l] = __reduce_add_sync(0xffffffffu, v);
  out[32 + l] = __reduce_min_sync(0xffffffffu, v);
  out[64 + l] = __reduce_max_sync(0xffffffffu, static_cast<int>(v));
  out[96 + l] = __reduce_and_sync(0xffffffffu, v);
  out[128 + l] = __reduce_or_sync(0xffffffffu, v);
  out[160 + l] = __reduce_xor_sync(0xffffffffu, v);
}
HARNESS_CASE("reductions", reductions, 1, 32, 0, 32, 192);

__global__ void elected(const uint32_t*, uint32_t* out) {
  const bool mine = ptx::elect_one();
  out[threadIdx.x] = __reduce_add_sync(0xffffffffu, mine ? 1u : 0u);
}
HARNESS_CASE("elect_one", elected, 1, 64, 0, 0, 64);

__global__ void atomics(const uint32_t* in, uint32_t* out) {
  const uint32_t v = in[threadIdx.x + 64 * blockIdx.x];
  atomicAdd(out, v);
  atomicMax(out + 1, v);
  atomicMin(out + 2, v);
  atomicXor(out + 3, v);
  atomicAdd(reinterpret_cast<float*>(out + 4), static_cast<float>(v % 16));
  atomicInc(out + 5, 100);
}
HARNESS_CASE("atomics", atomics, 4, 64, 0, 256, 6);

// Each of two consumers of 64 threads gets its own half from a producer, twice, through barriers that the other never sees.
__global__ void named_barriers(const uint32_t* in, uint32_t* out) {
  FASTLM_SHARED(uint32_t, s, 128);
  const int t = threadIdx.x % 64, who = threadIdx.x / 64;
  for (int round = 0; round < 2; round++) {
    if (who == 0) {
      for (int c = 0; c < 2; c++) {
        if (round > 0) ptx::barrier_sync(3 + c, 128);
        s[64 * c + t] = in[128 * round + 64 * c + t];
        ptx::barrier_arrive(1 + c, 128);
      }
    } else {
      ptx::barrier_sync(who, 128);
      out[128 * round + 64 * (who - 1) + t] = s[64 * (who - 1) + 63 - t];
      if (round == 0) ptx::barrier_arrive(2 + who, 128);
    }
  }
}
HARNESS_CASE("named_barriers", named_barriers, 1, 192, 0, 256, 256);

__global__ void named_barrier_template(const uint32_t* in, uint32_t* out) {
  FASTLM_SHARED(uint32_t, s, 64);
  if (threadIdx.x >= 64) return;
  s[threadIdx.x] = in[threadIdx.x];
  ptx::barrier_sync<5, 64>();
  out[threadIdx.x] = s[63 - threadIdx.x];
}
HARNESS_CASE("named_barrier_template", named_barrier_template, 1, 96, 0, 64, 64);

__global__ void counted_barrier(const uint32_t* in, uint32_t* out) {
  out[threadIdx.x] = __syncthreads_count(in[threadIdx.x] & 1);
  out[96 + threadIdx.x] = __syncthreads_or(in[threadIdx.x] > 0xffffff00u);
}
HARNESS_CASE("syncthreads_count", counted_barrier, 1, 96, 0, 96, 192);

__global__ void conversions(const uint32_t* in, uint32_t* out) {
  const int t = threadIdx.x;
  const float a = __uint_as_float(in[t]), b = __uint_as_float(in[64 + t]);
  out[t] = ptx::pack_bf16(a, b);
  out[64 + t] = ptx::pack_f16(a, b);
  out[128 + t] = ptx::to_tf32(a);
}
HARNESS_CASE("conversions", conversions, 1, 64, 0, 128, 192);

// Which bits a NaN gets is not promised: out is whether it still is one.
__global__ void tf32_of_nan(const uint32_t* in, uint32_t* out) {
  const float a = __uint_as_float(ptx::to_tf32(__uint_as_float(in[threadIdx.x])));
  out[threadIdx.x] = a != a;
}
HARNESS_CASE("tf32_of_nan", tf32_of_nan, 1, 32, 0, 32, 32);

__global__ void approximations(const uint32_t* in, uint32_t* out) {
  const int t = threadIdx.x;
  const float a = __uint_as_float(in[t]);
  out[t] = __float_as_uint(ptx::exp2_approx(a));
  out[64 + t] = __float_as_uint(ptx::tanh_approx(a));
  out[128 + t] = __float_as_uint(ptx::log2_approx(fabsf(a)));
  out[192 + t] = __float_as_uint(ptx::reciprocal_approx(a));
}
HARNESS_CASE("approximations", approximations, 1, 64, 0, 64, 256);

// Blocks add to a running sum one after the other, in the order of their number: acquire, and release.
__global__ void ordered_blocks(const uint32_t* in, uint32_t* out) {
  uint32_t* turn = out + 32;
  if (threadIdx.x == 0) {
    while (ptx::load_acquire(turn) != blockIdx.x) __nanosleep(20);
  }
  __syncthreads();
  out[threadIdx.x] = out[threadIdx.x] * 3 + in[32 * blockIdx.x + threadIdx.x];
  __syncthreads();
  if (threadIdx.x == 0) ptx::store_release(turn, blockIdx.x + 1);
}
HARNESS_CASE("ordered_blocks", ordered_blocks, 6, 32, 0, 192, 33);

// The last block to finish sums what the others wrote: fences and relaxed atomics.
__global__ void last_block(const uint32_t* in, uint32_t* out) {
  FASTLM_SHARED(uint32_t, last, 1);
  out[2 + 32 * blockIdx.x + threadIdx.x] = 2 * in[32 * blockIdx.x + threadIdx.x];
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last[0] = atomicAdd(out + 1, 1u) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  if (!last[0]) return;
  uint32_t sum = 0;
  for (unsigned b = 0; b < gridDim.x; b++) sum += out[2 + 32 * b + threadIdx.x];
  sum = __reduce_add_sync(0xffffffffu, sum);
  if (threadIdx.x == 0) out[0] = sum;
}
HARNESS_CASE("last_block", last_block, 5, 32, 0, 160, 162);

__global__ void relaxed_and_added(const uint32_t* in, uint32_t* out) {
  if (blockIdx.x > 0) {
    out[blockIdx.x] = in[blockIdx.x];
    ptx::add_release(out, 1);
  } else {
    while (ptx::load_relaxed(out) != gridDim.x - 1) {
    }
    __threadfence();
    uint32_t sum = 0;
    for (unsigned b = 1; b < gridDim.x; b++) sum += out[b];
    ptx::store_relaxed(out + gridDim.x, sum);
  }
}
HARNESS_CASE("relaxed_and_added", relaxed_and_added, 5, 1, 0, 5, 6);

}  // namespace
