// What a block of threads does at a time: a block of keys of one head of k and v, against the blocks of queries that see
// it, of all heads that share it. By the number of its ticket; all parts of the kernel go through the same works and steps.
#pragma once
#include "attention/sm90_backward/shape.h"

namespace fastlm::cuda::sm90_backward {

// A block of queries of a head, by its first row.
struct Step {
  int head, row;
};

template <int kQueries>
struct Work {
  Span span;
  int batch, kv_head, block, key0;  // block: how many there are after this one
  int first_row, row_stop;
  int first_head, head_stop;

  FASTLM_DEVICE Work(const AttentionInputs& p, const Grid& grid, int ticket) : span(span_of(p, 0)) {
    const Place place(grid, ticket);
    batch = place.sequence, kv_head = place.head, block = place.block;
    key0 = (grid.blocks - 1 - block) * kKeys;
    const Span keys = span.transposed();
    const int low = keys.low(key0), group = static_cast<int>(p.heads / p.kv_heads);
    row_stop = keys.high(keys.last(key0 + kKeys));
    first_row = low / kQueries * kQueries;
    head_stop = (kv_head + 1) * group;
    first_head = row_stop > low ? head_stop - group : head_stop;
  }
  FASTLM_DEVICE Step first() const { return {first_head, first_row}; }
  FASTLM_DEVICE bool has(Step s) const { return s.head < head_stop; }
  FASTLM_DEVICE Step after(Step s) const {
    return s.row + kQueries < row_stop ? Step{s.head, s.row + kQueries} : Step{s.head + 1, first_row};
  }
  FASTLM_DEVICE int steps() const { return (head_stop - first_head) * ((row_stop - first_row + kQueries - 1) / kQueries); }
  FASTLM_DEVICE int row_after(int row) const { return row + kQueries < row_stop ? row + kQueries : first_row; }
  // The number of the step's block of dq.
  FASTLM_DEVICE int64_t sum_of(const AttentionInputs& p, Step s) const {
    const int64_t blocks = (p.rows + kQueries - 1) / kQueries;
    return (batch * blocks + s.row / kQueries) * p.heads + s.head;
  }
  // How many blocks of keys come before this one at these queries: those up to the last key that they see.
  FASTLM_DEVICE uint32_t turn_of(Step s) const {
    return static_cast<uint32_t>(min((span.high(span.last(s.row + kQueries)) - 1 - key0) / kKeys, block));
  }
};

FASTLM_DEVICE int works_of(const Grid& grid) { return grid.blocks * grid.heads * grid.sequences; }

}  // namespace fastlm::cuda::sm90_backward
