// Tiles in shared memory: rows of kWidth elements in chunks of 16 bytes. Chunk c of row r lies at place c ^ (r % 8), so
// that the eight rows that ldmatrix reads at once, or that eight lanes write, fall on different banks.
#pragma once
#include "common/cuda/ptx_cp_async.h"
#include "common/cuda/vector.h"

namespace fastlm::cuda {

template <class T, int kWidth_>
struct Tile {
  using Element = T;
  static constexpr int kWidth = kWidth_;
  static constexpr int kRowBytes = kWidth * static_cast<int>(sizeof(T));
  static constexpr int kChunks = kRowBytes / 16;
  static constexpr int bytes(int rows) { return rows * kRowBytes; }
  static_assert(kChunks % 8 == 0, "the swizzle works on groups of eight chunks");

  unsigned char* data;  // aligned to 128 bytes
  uint32_t address;     // the same, as the PTX wrappers take it

  static FASTLM_DEVICE int offset(int row, int chunk) { return row * kRowBytes + ((chunk ^ (row & 7)) << 4); }
  FASTLM_DEVICE Tile after(int rows) const { return {data + bytes(rows), address + bytes(rows)}; }
};

// A matrix in global memory: rows of `chunks` chunks of 16 bytes, `stride` elements apart; the others read as zero.
template <class T>
struct Rows {
  const T* data;
  int64_t stride;
  int chunks;
};

// Begins to copy the rows [first, first + kRows) of a matrix to a tile; rows outside [begin, end) become zeros.
template <int kRows, int kThreads, class T, int kWidth>
FASTLM_DEVICE void load_tile(Tile<T, kWidth> tile, const Rows<T>& from, int first, int begin, int end) {
  constexpr int kChunks = Tile<T, kWidth>::kChunks;
  constexpr int kStep = kThreads / kChunks;  // rows at a time; a thread stays at its chunk
  static_assert(kThreads % kChunks == 0 && kRows % kStep == 0, "the threads share the tile evenly");
  const int chunk = threadIdx.x % kChunks, row = threadIdx.x / kChunks;
  const unsigned count = chunk < from.chunks ? end - begin : 0;
  const T* source = from.data + (first + row) * from.stride + chunk * (16 / static_cast<int>(sizeof(T)));
#pragma unroll
  for (int i = 0; i < kRows; i += kStep) {
    const bool there = static_cast<unsigned>(first + row + i - begin) < count;  // else the address is not read
    ptx::cp_async_16(tile.address + tile.offset(row + i, chunk), source, there ? 16 : 0);
    source += kStep * from.stride;
  }
}

// kCount floats of an array, [first, first + kCount), to shared memory; those from `end` on become zeros.
template <int kCount>
FASTLM_DEVICE void load_floats(uint32_t to, const float* from, int first, int end) {
  const int i = threadIdx.x;
  if (i < kCount) {
    const bool there = first + i < end;
    ptx::cp_async_small<4>(to + 4 * i, there ? from + first + i : from, there ? 4 : 0);
  }
}

// Copies kRows rows of a tile that this warp wrote to global memory: row r of the tile to row first + r, where that lies
// in [begin, end).
template <int kRows, class T, int kWidth>
FASTLM_DEVICE void store_tile(Tile<T, kWidth> tile, int tile_row, int first_chunk, int chunks, T* to, int64_t stride, int first,
                              int begin, int end, int width_chunks) {
  const int lane = threadIdx.x % 32;
  for (int c = lane; c < kRows * chunks; c += 32) {
    const int row = c / chunks, chunk = first_chunk + c % chunks, r = first + row;
    if (r >= begin && r < end && chunk < width_chunks) {
      reinterpret_cast<uint4*>(to + r * stride)[chunk] =
          *reinterpret_cast<const uint4*>(tile.data + tile.offset(tile_row + row, chunk));
    }
  }
}

}  // namespace fastlm::cuda
