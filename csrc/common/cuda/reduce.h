// Sums over a warp and over several warps, in an order that does not depend on timing.
#pragma once
#include "common/cuda/platform.h"

namespace fastlm::cuda {

constexpr unsigned kFullWarp = 0xffffffffu;

// Every lane gets the sum over the 32 lanes (butterfly: all lanes compute the same bits, since a + b == b + a).
FASTLM_DEVICE float warp_sum(float v) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(kFullWarp, v, offset);
  return v;
}

FASTLM_DEVICE float warp_max(float v) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) v = fmaxf(v, __shfl_xor_sync(kFullWarp, v, offset));
  return v;
}

// Sums two values over `warps` neighbouring warps of the block, of which this thread's is number `warp`. `scratch` has
// room for the group's float2s, one a warp, and must not have been read by the group since the last barrier.
// Every thread of the block has to call it, because it synchronises the block where there is more than one warp.
FASTLM_DEVICE float2 group_sum(float2 v, float2* scratch, int warp, int warps) {
  v.x = warp_sum(v.x);
  v.y = warp_sum(v.y);
  if (warps == 1) return v;
  if (threadIdx.x % 32 == 0) scratch[warp] = v;
  __syncthreads();
  v = make_float2(0.0f, 0.0f);
  for (int i = 0; i < warps; i++) {
    v.x += scratch[i].x;
    v.y += scratch[i].y;
  }
  return v;
}

}  // namespace fastlm::cuda
