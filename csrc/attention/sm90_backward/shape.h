// The backward for Hopper: sizes, and what lies where in shared memory.
//
// A block of 128 keys against blocks of queries. Matrices lie in rows of 128 bytes, 64 elements of the head dim (of dS: 64
// queries), whose pieces of 16 bytes are permuted within each eight rows; all rows of the first 64 columns come before those
// of the next. TMA writes that and wgmma reads it, both ways round.
#pragma once
#include "attention/sm80/backward.h"
#include "common/cuda/wgmma_element.h"

namespace fastlm::cuda::sm90_backward {

constexpr int kKeys = 128, kGroupKeys = 64;  // of a block, and of each of its two warpgroups that multiply
constexpr int kThreads = 384;                // one warpgroup more: it loads, and adds to dq
constexpr int kColumns = 64, kRowBytes = 128, kAtom = 8 * kRowBytes;
constexpr int kStages = 2;                      // of queries
constexpr int kSum = 2 * 64 * 64, kSumBytes = 4 * kSum;  // the floats of dq of a step; each warpgroup makes half of them
constexpr int kSums = 2;                                 // so many steps' dq may wait for their turns

template <class T_, int kWidth_>
struct Shape {
  using T = T_;
  static constexpr int kWidth = kWidth_, kHalves = kWidth / kColumns;
  static constexpr int kQueries = kWidth <= 64 ? 128 : 64;  // so that S, dP, dK and dV take 192 registers either way
  static constexpr int kKeyStages = kWidth <= 64 ? 2 : 1;   // of keys: the next block's are loaded before this one's is done
  static_assert(kQueries * kWidth == kSum, "each warpgroup makes 64 by 64 of dq");

  static constexpr int kKeyTile = kKeys * kWidth * 2, kQueryTile = kQueries * kWidth * 2, kDsTile = kQueries * kKeys * 2;
  static constexpr int kStatistics = kQueries * 4;
  static constexpr int kQueryAt = kKeyStages * 2 * kKeyTile, kDsAt = kQueryAt + kStages * 2 * kQueryTile;
  static constexpr int kSumAt = kDsAt + kDsTile, kStatisticsAt = kSumAt + kSums * kSumBytes;
  static constexpr int kBytes = kStatisticsAt + kStages * 2 * kStatistics;

  uint32_t base, barriers;  // shared addresses

  FASTLM_DEVICE uint32_t k(int slot) const { return base + slot * 2 * kKeyTile; }
  FASTLM_DEVICE uint32_t v(int slot) const { return k(slot) + kKeyTile; }
  FASTLM_DEVICE uint32_t q(int stage) const { return base + kQueryAt + stage * 2 * kQueryTile; }
  FASTLM_DEVICE uint32_t dout(int stage) const { return q(stage) + kQueryTile; }
  FASTLM_DEVICE uint32_t ds() const { return base + kDsAt; }
  FASTLM_DEVICE uint32_t sum(int slot) const { return base + kSumAt + slot * kSumBytes; }
  FASTLM_DEVICE uint32_t lse(int stage) const { return base + kStatisticsAt + stage * 2 * kStatistics; }
  FASTLM_DEVICE uint32_t delta(int stage) const { return lse(stage) + kStatistics; }

  // Number n of what goes round in kCount places has the place n % kCount and its barriers' parity n / kCount % 2.
  static constexpr int kBarriers = 2 * kKeyStages + 3 * kStages + 2 + 2 * kSums;
  FASTLM_DEVICE uint32_t keys_full(int slot) const { return barriers + 8 * slot; }
  FASTLM_DEVICE uint32_t keys_empty(int slot) const { return barriers + 8 * (kKeyStages + slot); }
  FASTLM_DEVICE uint32_t q_full(int stage) const { return barriers + 8 * (2 * kKeyStages + stage); }
  FASTLM_DEVICE uint32_t dout_full(int stage) const { return q_full(stage) + 8 * kStages; }
  FASTLM_DEVICE uint32_t empty(int stage) const { return q_full(stage) + 16 * kStages; }
  FASTLM_DEVICE uint32_t ds_full() const { return barriers + 8 * (2 * kKeyStages + 3 * kStages); }
  FASTLM_DEVICE uint32_t ds_empty() const { return ds_full() + 8; }
  FASTLM_DEVICE uint32_t sum_full(int slot) const { return ds_full() + 8 * (2 + slot); }
  FASTLM_DEVICE uint32_t sum_empty(int slot) const { return sum_full(kSums + slot); }
};

}  // namespace fastlm::cuda::sm90_backward
