// What happens to a block of scores between the products: softcap, ALiBi, mask, dropout. acc[r][n][e] is the score of row
// `row` + 16 r + 8 (e / 2) and column `column` + 8 n + e % 2, where row and column are those of this lane's first element.
#pragma once
#include "attention/sm80/span.h"
#include "common/cuda/philox.h"
#include "common/cuda/ptx_math.h"
#include "common/cuda/reduce.h"

namespace fastlm::cuda {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kInfinity = INFINITY;

FASTLM_DEVICE float tanh_by_exp2(float x) {  // to about 2e-7, absolutely
  return 1.0f - 2.0f * ptx::reciprocal_approx(1.0f + ptx::exp2_approx(2.0f * kLog2E * x));
}

// From products q . k to scores, and from scores to weights 2^(log2e (score - base)). Where not kGeneral, a product is the
// score as it is, `base_of` takes the factor to a maximum, and a weight costs one multiplication and addition.
template <bool kGeneral>
struct Scoring {
  float scale, factor;

  FASTLM_DEVICE Scoring(const AttentionInputs& p, int64_t, int) : scale(p.scale), factor(p.scale * kLog2E) {}
  FASTLM_DEVICE float score(float product, int, float& slope) const {
    slope = 1.0f;
    return product;
  }
  FASTLM_DEVICE float base_of(float maximum) const { return maximum * factor; }
  FASTLM_DEVICE float weight(float score, float base) const { return ptx::exp2_approx(score * factor - base); }
  FASTLM_DEVICE float natural(float maximum) const { return maximum * scale; }
};

// With softcap and ALiBi. float32 is computed here as well, so differences are taken before anything is rounded again.
template <>
struct Scoring<true> {
  float scale, softcap, inverse_cap, alibi;

  FASTLM_DEVICE Scoring(const AttentionInputs& p, int64_t batch, int head)
      : scale(p.scale), softcap(p.softcap), inverse_cap(1.0f / p.softcap), alibi(0.0f) {
    if (p.alibi_slopes != nullptr) alibi = p.alibi_slopes[batch * p.alibi_batch_stride + head];
  }
  // distance: of the column from the one that the row is aligned with. slope: the softcap's derivative.
  FASTLM_DEVICE float score(float product, int distance, float& slope) const {
    float x = product * scale;
    slope = 1.0f;
    if (softcap > 0.0f) {
      const float t = tanh_by_exp2(x * inverse_cap);
      x = softcap * t;
      slope = 1.0f - t * t;
    }
    return x - alibi * fabsf(static_cast<float>(distance));
  }
  FASTLM_DEVICE float base_of(float maximum) const { return maximum; }
  FASTLM_DEVICE float weight(float score, float base) const { return ptx::exp2_approx((score - base) * kLog2E); }
  FASTLM_DEVICE float natural(float maximum) const { return maximum; }
};

// What is not visible becomes `value`, in each of some blocks.
template <int kRowTiles, int kTiles, class... Others>
FASTLM_DEVICE void hide(float value, const Span& span, int row, int column, float (&acc)[kRowTiles][kTiles][4], Others&... others) {
  // Relative to the column, so that the limits of each row are no loop invariants, which would take registers.
  const int first = span.column - column, end = span.column_end - column, aligned = row + span.diagonal - column;
#pragma unroll
  for (int r = 0; r < kRowTiles; r++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int at = aligned + 16 * r + 8 * half, low = max(first, at - span.left), high = min(end, at + span.right + 1);
#pragma unroll
      for (int n = 0; n < kTiles; n++) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
          if (8 * n + e < low || 8 * n + e >= high) {
            acc[r][n][2 * half + e] = value;
            ((others[r][n][2 * half + e] = value), ...);
          }
        }
      }
    }
  }
}

// Which weights dropout keeps. Element (row i, column j) takes word j % 4 of the counter (i, j / 4, plane, offset).
struct Dropout {
  PhiloxKey key;
  uint32_t offset, threshold;

  FASTLM_DEVICE explicit Dropout(const AttentionInputs& p) : key{0, 0}, offset(0), threshold(p.dropout_threshold) {
    if (p.rng_state != nullptr) {
      const uint64_t seed = static_cast<uint64_t>(p.rng_state[0]);
      key = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
      offset = static_cast<uint32_t>(p.rng_state[1]);
    }
  }
  FASTLM_DEVICE void draw(uint32_t (&c)[4], int i, int quad, uint32_t plane) const {
    c[0] = static_cast<uint32_t>(i);
    c[1] = static_cast<uint32_t>(quad);
    c[2] = plane;
    c[3] = offset;
    philox(c, key);
  }

  // Bit 4 n + e: whether acc[n][e] is kept, for queries along the rows of acc. column - 2 (lane % 4) is a multiple of 8.
  // Lanes 2 k and 2 k + 1 need halves of the same two counters: one for the row g and one for the row g + 8.
  template <int kTiles>
  FASTLM_DEVICE uint32_t kept_by_rows(int row, int column, uint32_t plane) const {
    const bool odd = threadIdx.x & 1;
    uint32_t bits = 0;
#pragma unroll 1
    for (int n = 0; n < kTiles; n++) {
      uint32_t c[4];
      draw(c, row + (odd ? 8 : 0), (column + 8 * n) / 4, plane);
      const uint32_t first = __shfl_xor_sync(kFullWarp, odd ? c[0] : c[2], 1);
      const uint32_t second = __shfl_xor_sync(kFullWarp, odd ? c[1] : c[3], 1);
      const uint32_t words[4] = {odd ? first : c[0], odd ? second : c[1], odd ? c[2] : first, odd ? c[3] : second};
#pragma unroll
      for (int e = 0; e < 4; e++) bits |= (words[e] >= threshold ? 1u : 0u) << (4 * n + e);
    }
    return bits;
  }

  // The same for keys along the rows of acc: `row` is j, `column` is i. row - g is a multiple of 4. The four lanes of four
  // neighbouring keys need one word each of the same four counters: two queries, and the keys of acc's two halves.
  template <int kTiles>
  FASTLM_DEVICE uint32_t kept_by_columns(int row, int column, uint32_t plane) const {
    const int lane = threadIdx.x >> 2 & 3;
    uint32_t bits = 0;
#pragma unroll 1
    for (int n = 0; n < kTiles; n++) {
      uint32_t c[4];
      draw(c, column + 8 * n + (lane & 1), row / 4 + (lane & 2), plane);
      exchange<1>(c[0], c[1], lane);  // a 4 x 4 transposition
      exchange<1>(c[2], c[3], lane);
      exchange<2>(c[0], c[2], lane);
      exchange<2>(c[1], c[3], lane);
#pragma unroll
      for (int e = 0; e < 4; e++) bits |= (c[e] >= threshold ? 1u : 0u) << (4 * n + e);
    }
    return bits;
  }

  template <int kBit>
  static FASTLM_DEVICE void exchange(uint32_t& a, uint32_t& b, int lane) {
    const bool upper = lane & kBit;
    const uint32_t other = __shfl_xor_sync(kFullWarp, upper ? a : b, 4 * kBit);
    (upper ? a : b) = other;
  }
};

}  // namespace fastlm::cuda
