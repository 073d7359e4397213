// The five products, by a warpgroup with 64 of the block's keys.
//
//   S^T = K Q^T,   dP^T = V dO^T            keys by queries: the accumulators are, as P^T and dS^T in 16 bits, the a of
//   dV += P^T dO,  dK += dS^T Q             and these need nothing from shared memory but dO and Q
//   dQ = dS K                               of all 128 keys: here each of the two warpgroups has half of dQ
#pragma once
#include "attention/sm90_backward/shape.h"

namespace fastlm::cuda::sm90_backward {

constexpr auto kAlongK = ptx::Major::k, kAcross = ptx::Major::mn;

template <int kN, class S>
using Product = ptx::Wgmma<kN, WgmmaElement<typename S::T>::kWgmma>;

FASTLM_DEVICE uint64_t tile_at(uint32_t address, int leading = kAtom) {
  return ptx::wgmma_descriptor(address, leading, kAtom, Swizzle::b128);
}
// The same some bytes further on: addresses do not reach the end of their 14 bits.
FASTLM_DEVICE uint64_t moved(uint64_t tile, int bytes) { return tile + static_cast<uint64_t>(bytes >> 4); }

// d = a b^T: 64 of the keys' rows, all queries' rows, over the head dim.
template <class S>
FASTLM_DEVICE void rows_by_rows(float (&d)[S::kQueries / 2], uint32_t keys, uint32_t queries) {
  const uint64_t a = tile_at(keys), b = tile_at(queries);
#pragma unroll
  for (int i = 0; i < S::kWidth / 16; i++) {
    const int half = i / 4, piece = i % 4 * 32;
    Product<S::kQueries, S>::template ss<kAlongK, kAlongK>(d, moved(a, half * kKeys * kRowBytes + piece),
                                                           moved(b, half * S::kQueries * kRowBytes + piece), i > 0);
  }
}

template <class S>
using Weights = uint32_t[S::kQueries / 16][4];  // P^T or dS^T, as an a of wgmma

// d += a b, over the queries.
template <class S>
FASTLM_DEVICE void add_weighted_rows(float (&d)[S::kWidth / 2], const Weights<S>& a, uint32_t queries) {
  const uint64_t b = tile_at(queries, S::kQueries * kRowBytes);
#pragma unroll
  for (int i = 0; i < S::kQueries / 16; i++) Product<S::kWidth, S>::template rs<kAcross>(d, a[i], moved(b, 2 * i * kAtom), true);
}

// d = dS K, over the keys: 64 queries by 64 columns. ds and k point at these.
template <class S>
FASTLM_DEVICE void dq_of(float (&d)[32], uint32_t ds, uint32_t k) {
  const uint64_t a = tile_at(ds), b = tile_at(k);
#pragma unroll
  for (int i = 0; i < kKeys / 16; i++) {
    Product<64, S>::template ss<kAcross, kAcross>(d, moved(a, 2 * i * kAtom), moved(b, 2 * i * kAtom), i > 0);
  }
}

}  // namespace fastlm::cuda::sm90_backward
