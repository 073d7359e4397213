// Attention of a few new tokens over a cache of keys and values, for generation (fastlm/ops/decode_attention has the
// contract). Each sequence has a length of its own; its rows lie one after the other, or in pages that a table names.
//
//   s[t, j] = softcap * tanh(scale * q_t . k_j / softcap) - slope * |i - j|,  i = length - T + t, for i - window <= j <= i
//
// The columns are cut into parts of one size, whatever the batch and the machine: each part leaves its maximum, its sum of
// exponentials and its weighted sum of values, and the parts of a row are put together in their order. So a sequence gets
// the same bits alone, in any batch, and with any number of threads.
#pragma once
#include "common/dtype.h"

namespace fastlm {

constexpr int64_t kDecodePart = 128, kDecodePartCuda = 64;  // columns; on a GPU a part takes as long as its loads' latency

struct DecodeAttention {
  const void* q;  // (B, T, H, D), packed
  const void *k, *v;  // (B, S, H_kv, D), or with a table (pages, page, H_kv, D); the last dimension contiguous
  int64_t k_strides[3], v_strides[3];  // of the batch entry or page, the row, the head
  const int32_t* lengths;              // (B): tokens in the cache, the new ones included
  const int32_t* table;                // (B, table_width): the page of each `page` columns; null: no pages
  const float* alibi_slopes;           // null: none
  int64_t alibi_batch_stride;
  void* out;         // (B, T, H, D), packed
  float* workspace;  // decode_attention_workspace(...) floats
  int64_t batch, rows, heads, kv_heads, width;  // B, T, H, H_kv, D
  int64_t capacity;                             // S, or table_width * page
  int64_t pages, page, table_width;
  int64_t window;  // -1: none
  float scale, softcap;
  DType type;
};

// A partial result: width floats, the maximum, the sum. They are ordered by batch entry, part, head, row.
inline int64_t decode_parts(int64_t capacity, int64_t part = kDecodePart) { return (capacity + part - 1) / part; }

inline int64_t decode_attention_workspace(int64_t batch, int64_t rows, int64_t heads, int64_t width, int64_t capacity) {
  return batch * decode_parts(capacity, kDecodePartCuda) * heads * rows * (width + 2);  // of the two the more
}

// Throws std::invalid_argument where a length or a page is out of range.
void decode_attention_cpu(const DecodeAttention& p);

// A length over the capacity counts as the capacity; a page out of range is not looked at.
void decode_attention_cuda(const DecodeAttention& p, void* stream);

}  // namespace fastlm
