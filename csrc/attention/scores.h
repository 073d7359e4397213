// What happens to a block of scores s[j * kRows + lane] between the products: softcap, ALiBi, mask, dropout. Each is a
// pass of its own over the block, which lies in the first-level cache and took a hundred times as long to make.
#pragma once
#include <limits>

#include "attention/blocks.h"
#include "common/philox.h"
#include "common/simd_math.h"

namespace fastlm::FASTLM_ISA {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// e^x for weights: 0 below e^-87, since what is smaller than 2^-126 takes the processor a hundred times as long. The
// hidden scores, -inf, are of that kind.
inline Vec exp_of_score(Vec x) { return if_less(x, set1(-87.0f), zero(), exp(max(set1(-87.0f), x))); }

// body(j, i): a vector of lanes from lane i on, in row j of the block.
template <class Body>
inline void over_block(int64_t columns, int64_t lanes, const Body& body) {
  for (int64_t j = 0; j < columns; ++j) {
    for (int64_t i = 0; i < lanes; i += Vec::size) body(j, i);
  }
}

// s = softcap tanh(s / softcap); slope, where there is one: its derivative.
inline void soft_cap(float softcap, int64_t columns, int64_t lanes, float* s, float* slope) {
  const Vec cap = set1(softcap), inverse = set1(1.0f / softcap), one = set1(1.0f);
  over_block(columns, lanes, [&](int64_t j, int64_t i) {
    const Vec t = tanh(load(s + j * kRows + i) * inverse);
    store(s + j * kRows + i, cap * t);
    if (slope != nullptr) store(slope + j * kRows + i, one - t * t);
  });
}

inline void add_alibi(const Lanes& lanes, int64_t j0, int64_t columns, float* s) {
  over_block(columns, lanes.padded, [&](int64_t j, int64_t i) {
    const Vec distance = abs(load(lanes.position + i) - set1(static_cast<float>(j0 + j)));
    store(s + j * kRows + i, load(s + j * kRows + i) - load(lanes.slope + i) * distance);
  });
}

inline void mask(const AttentionInputs& p, const Lanes& lanes, int64_t j0, int64_t columns, float* s) {
  const Vec left = set1(p.window_left < 0 ? kInfinity : static_cast<float>(p.window_left));
  const Vec right = set1(p.window_right < 0 ? kInfinity : static_cast<float>(p.window_right));
  const Vec hidden = set1(-kInfinity);
  over_block(columns, lanes.padded, [&](int64_t j, int64_t i) {
    const Vec position = load(lanes.position + i), column = set1(static_cast<float>(j0 + j));
    const Vec score = if_less(column, position - left, hidden, load(s + j * kRows + i));
    store(s + j * kRows + i, if_less(position + right, column, hidden, score));
  });
}

// From scale q . k to the scores. What was left uncomputed because nothing of it is visible becomes -inf.
inline void finish_scores(const AttentionInputs& p, const Lanes& lanes, int64_t j0, int64_t columns, bool partial,
                          float* s, float* slope) {
  if (p.softcap > 0.0f) soft_cap(p.softcap, columns, lanes.padded, s, slope);
  if (p.alibi_slopes != nullptr) add_alibi(lanes, j0, columns, s);
  if (partial) mask(p, lanes, j0, columns, s);
}

// keep[j * kRows + lane]: 1 / (1 - p) where dropout keeps the weight, else 0. Column j is word j % 4 of the counter
// (row, j / 4, plane, offset).
inline void dropout_factors(const AttentionInputs& p, const Lanes& lanes, int64_t j0, int64_t columns, float* keep) {
  const uint64_t seed = static_cast<uint64_t>(p.rng_state[0]);
  const uint32_t offset = static_cast<uint32_t>(p.rng_state[1]);
  const PhiloxKey key{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  for (int64_t i = 0; i < lanes.padded; i += Vec::size) {
    for (int64_t quad = j0 / 4; quad * 4 < j0 + columns; ++quad) {
      const PhiloxWords random =
          philox(lanes.counter_row + i, static_cast<uint32_t>(quad), lanes.counter_plane + i, offset, key);
      for (int64_t w = 0; w < 4; ++w) {
        const int64_t j = quad * 4 + w - j0;
        if (j < 0 || j >= columns) continue;
        float* to = keep + j * kRows + i;
        for (int64_t l = 0; l < Vec::size; ++l)
          to[l] = random.word[w][l] >= p.dropout_threshold ? p.dropout_scale : 0.0f;
      }
    }
  }
}

inline void multiply(int64_t columns, int64_t lanes, const float* factors, float* s) {
  over_block(columns, lanes, [&](int64_t j, int64_t i) {
    store(s + j * kRows + i, load(s + j * kRows + i) * load(factors + j * kRows + i));
  });
}

}  // namespace fastlm::FASTLM_ISA
