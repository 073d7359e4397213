// What a block of threads does at a time: a block of keys of one head of k and v, against the blocks of queries that see
// it, of all heads that share it. By the number of its ticket; all parts of the kernel go through the same works and steps.
//
// Queries are taken from the last on. Under a causal mask all blocks of keys have those in common; from the first on, each
// would wait for the one before it to come to its own first queries.
#pragma once
#include "attention/sm90_backward/shape.h"

namespace fastlm::cuda::sm90_backward {

// All works, and how they are numbered. dq is added up from the first keys on. The heads of k and v are taken in groups: the
// first block of keys of all heads of a group, then the next one of all. So a block of keys begins when the one before it is
// some steps ahead, a group ends with what takes least time under a causal mask, and its dq is in the L2 cache meanwhile.
// The host has computed what it can, in 32 bits: the threads that load have few registers.
struct Task {
  Span span;             // the same for all batch entries
  int heads, kv_heads, shared_by;  // shared_by: heads of q for one of k and v
  int key_blocks, query_blocks;    // of a head
  int pairs, group;      // heads of k and v of all batch entries, and so many of them make a group
  int padded_rows;       // of a head's lse and delta
  float factor;          // of products q . k to scores in powers of 2

  FASTLM_DEVICE int works() const { return key_blocks * pairs; }
};

// A block of queries of a head, by its first row.
struct Step {
  int head, row;
};

template <int kQueries>
struct Work {
  int batch, kv_head, key0;
  int low_row, high_row;  // the first rows of the lowest and of the highest block of queries that sees the keys
  int first_head, head_stop;

  FASTLM_DEVICE Work(const Task& task, int ticket) {
    const int first_pair = ticket / (task.group * task.key_blocks) * task.group;
    const int pairs = min(task.group, task.pairs - first_pair), in_group = ticket - first_pair * task.key_blocks;
    const int block = in_group / pairs, pair = first_pair + in_group - block * pairs;
    key0 = block * kKeys;
    batch = pair / task.kv_heads;
    kv_head = pair - batch * task.kv_heads;
    const Span keys = task.span.transposed();
    const int low = keys.low(key0), stop = keys.high(keys.last(key0 + kKeys));
    low_row = low / kQueries * kQueries;
    high_row = (stop - 1) / kQueries * kQueries;
    head_stop = (kv_head + 1) * task.shared_by;
    first_head = stop > low ? head_stop - task.shared_by : head_stop;
  }
  FASTLM_DEVICE Step first() const { return {first_head, high_row}; }
  FASTLM_DEVICE bool has(Step s) const { return s.head < head_stop; }
  FASTLM_DEVICE int row_after(int row) const { return row > low_row ? row - kQueries : high_row; }
  FASTLM_DEVICE Step after(Step s) const { return {s.row > low_row ? s.head : s.head + 1, row_after(s.row)}; }
  FASTLM_DEVICE int steps() const { return (head_stop - first_head) * ((high_row - low_row) / kQueries + 1); }
  // The number of the step's block of dq.
  FASTLM_DEVICE int sum_of(const Task& task, Step s) const {
    return (batch * task.query_blocks + s.row / kQueries) * task.heads + s.head;
  }
  // How many blocks of keys come before this one at these queries: those from the first key that they see.
  FASTLM_DEVICE uint32_t turn_of(const Task& task, Step s) const {
    return static_cast<uint32_t>(key0 / kKeys - task.span.low(s.row) / kKeys);
  }
};

}  // namespace fastlm::cuda::sm90_backward
