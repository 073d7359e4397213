// New keys and values into a cache, each sequence's behind its own last ones.
#pragma once
#include "common/dtype.h"

namespace fastlm {

struct CacheAppend {
  void *k_cache, *v_cache;                   // (B, S, H_kv, D), heads and D contiguous
  const void *k, *v;                         // (B, H_kv, D), heads and D contiguous
  const int64_t* at;                         // (B): the row of the cache; one out of range is left out
  int64_t k_cache_strides[2], v_cache_strides[2];  // of the sequence, the row; elements
  int64_t k_stride, v_stride;                // of the sequence
  int64_t batch, capacity, cols;             // B, S, H_kv * D
  DType type;
};

void cache_append_cuda(const CacheAppend& p, void* stream);

}  // namespace fastlm
