// The online softmax of a warpgroup's 64 rows, on the accumulators of wgmma: element 4 n + 2 half + e of a thread is the
// score of row 8 half + lane / 4 of its warp's sixteen and of column 8 n + 2 (lane % 4) + e.
#pragma once
#include "attention/sm80/fragments.h"
#include "attention/sm80/scores.h"
#include "common/cuda/ptx_registers.h"

namespace fastlm::cuda {

// Scores that are not visible become -inf. row and column: of this thread's first element. The warpgroup's tile has the 64
// rows from tile_row on and kCount * 2 columns from tile_column on; most tiles are seen whole, most others cut on one side.
template <int kCount>
FASTLM_DEVICE void hide(const Span& span, int tile_row, int tile_column, int row, int column, float (&s)[kCount]) {
  const int aligned = row + span.diagonal - column, tile_end = tile_column + 2 * kCount;
  if (tile_end > min(span.column_end, tile_row + span.diagonal + span.right + 1)) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int high = min(span.column_end - column, aligned + 8 * half + span.right + 1);
#pragma unroll
      for (int i = 0; i < kCount / 2; i++) {
        const int n = i / 2, e = i % 2;
        if (8 * n + e >= high) s[4 * n + 2 * half + e] = -kInfinity;
      }
    }
  }
  if (tile_column < max(span.column, tile_row + 63 + span.diagonal - span.left)) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int low = max(span.column - column, aligned + 8 * half - span.left);
#pragma unroll
      for (int i = 0; i < kCount / 2; i++) {
        const int n = i / 2, e = i % 2;
        if (8 * n + e < low) s[4 * n + 2 * half + e] = -kInfinity;
      }
    }
  }
}

// Of a thread's two rows. A weight is 2^(factor score - base), base being about the largest factor * score so far. It follows
// a new maximum only where that is far higher: weights stay below 2^kSlack, what was summed is rarely rescaled, and the
// result is the same but for rounding.
struct ForwardSoftmax {
  static constexpr float kSlack = 8.0f;
  float base[2] = {-kInfinity, -kInfinity};
  float sum[2] = {0.0f, 0.0f};  // over this thread's columns alone

  // Scores become weights. decay: what everything summed before is to be multiplied by.
  template <int kCount>
  FASTLM_DEVICE void add(float (&s)[kCount], float factor, float (&decay)[2]) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float largest[2] = {s[2 * half], s[2 * half + 1]};  // two chains each: neither waits for the other
#pragma unroll
      for (int n = 1; n < kCount / 4; n++) {
        largest[0] = fmaxf(largest[0], s[4 * n + 2 * half]);
        largest[1] = fmaxf(largest[1], s[4 * n + 2 * half + 1]);
      }
      float most = fmaxf(largest[0], largest[1]);
      most = fmaxf(most, __shfl_xor_sync(kFullWarp, most, 1));
      most = fmaxf(most, __shfl_xor_sync(kFullWarp, most, 2)) * factor;
      const bool higher = most > base[half] + kSlack;
      decay[half] = higher ? ptx::exp2_approx(base[half] - most) : 1.0f;
      if (higher) base[half] = most;
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const float from = base[half] == -kInfinity ? 0.0f : base[half];  // -inf - -inf would be NaN
      float total[2] = {0.0f, 0.0f};
#pragma unroll
      for (int n = 0; n < kCount / 4; n++) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
          float& weight = s[4 * n + 2 * half + e];
          weight = ptx::exp2_approx(weight * factor - from);
          total[e] += weight;
        }
      }
      sum[half] = sum[half] * decay[half] + (total[0] + total[1]);
    }
  }

  // The sum of all columns. Everything has been added.
  FASTLM_DEVICE float whole_sum(int half) const {
    float all = sum[half];
    all += __shfl_xor_sync(kFullWarp, all, 1);
    return all + __shfl_xor_sync(kFullWarp, all, 2);
  }
  FASTLM_DEVICE float lse(int half, float whole) const {  // of no column: -inf
    constexpr float kLn2 = 0.6931471805599453f;
    return kLn2 * (base[half] + ptx::log2_approx(whole));
  }
};

template <int kCount>
FASTLM_DEVICE void rescale(float (&out)[kCount], const float (&decay)[2]) {
  if (!__any_sync(kFullWarp, decay[0] != 1.0f || decay[1] != 1.0f)) return;
#pragma unroll
  for (int n = 0; n < kCount / 4; n++) {
#pragma unroll
    for (int e = 0; e < 4; e++) out[4 * n + e] *= decay[e / 2];
  }
}

// Weights as the A operand of a product over their columns: accumulators of 16 columns are one instruction's.
template <class T, int kCount>
FASTLM_DEVICE void pack_weights(const float (&s)[kCount], uint32_t (&a)[kCount / 8][4]) {
#pragma unroll
  for (int i = 0; i < kCount / 8; i++) {
#pragma unroll
    for (int r = 0; r < 4; r++) a[i][r] = pack(s[8 * i + 2 * r], s[8 * i + 2 * r + 1], T());
  }
}

}  // namespace fastlm::cuda
