// Which blocks of query rows a block of threads works on, one after the other, and which keys each of them takes.
#pragma once
#include "attention/sm80/launch.h"

namespace fastlm::cuda {

// A turn of the persistent loop. The keys are read from the last tile down to the first: under a causal mask the tiles that
// are seen in part come first.
struct ForwardWork {
  Span span;
  int sequence, head;
  int row0;          // of kRows, of which those before span.row are none
  int first, tiles;  // tile t has the keys from first + (tiles - 1 - t) * kColumns on
};

// Work number i. The last rows of all heads come first: under a causal mask they see the most. What is left over where kRows
// does not divide the rows is the first of them, which see the least: a block that is not full costs as much as a full one.
template <int kRows, int kColumns>
FASTLM_DEVICE ForwardWork forward_work(const AttentionInputs& p, const Grid& grid, int i) {
  const int planes = grid.heads * grid.sequences, plane = i % planes;
  ForwardWork work;
  work.head = plane % grid.heads;
  work.sequence = plane / grid.heads;
  work.span = span_of(p, work.sequence);
  work.row0 = work.span.row_end - (i / planes + 1) * kRows;
  work.first = work.tiles = 0;
  if (work.row0 + kRows > work.span.row) {
    work.first = work.span.low(max(work.row0, work.span.row));
    const int end = work.span.high(work.row0 + kRows - 1);
    if (end > work.first) work.tiles = (end - work.first + kColumns - 1) / kColumns;
  }
  return work;
}

// The works of this block of threads: every second round of the grid goes backwards, so that nobody always has the heavier
// ones. next() is -1 after the last.
struct ForwardWorks {
  int count, start = 0;
  bool backwards = false;

  FASTLM_DEVICE explicit ForwardWorks(const Grid& grid) : count(grid.blocks * grid.heads * grid.sequences) {}
  FASTLM_DEVICE int next() {
    const int blocks = static_cast<int>(gridDim.x), block = static_cast<int>(blockIdx.x);
    if (count - start <= 0) return -1;
    const int i = start + (backwards ? blocks - 1 - block : block);
    // A block that the last round has nothing for is done, since there is no other round.
    start = count - start > blocks ? start + blocks : count;
    backwards = !backwards;
    return i < count ? i : -1;
  }
};

// The tiles [begin, end) of a work that some of its rows see, the 64 from `row` on.
struct ForwardTiles {
  int begin, end;

  template <int kColumns>
  static FASTLM_DEVICE ForwardTiles seen(const ForwardWork& work, int row) {
    if (row + 64 <= work.span.row) return {work.tiles, work.tiles};
    const int low = work.span.low(max(row, work.span.row)) - work.first, high = work.span.high(row + 63) - work.first;
    if (high <= low) return {work.tiles, work.tiles};
    return {work.tiles - (high + kColumns - 1) / kColumns, work.tiles - low / kColumns};
  }
};

}  // namespace fastlm::cuda
