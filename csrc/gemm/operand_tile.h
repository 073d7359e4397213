// One operand's part of a stage in shared memory: kSize rows (of m or n) by 64 bytes of k, how it is filled from global
// memory, and how a warp reads the fragments of mma.sync from it.
//
// As the operand lies in memory, so lies the tile: kSize rows of 64 bytes, or, transposed, 64 / sizeof(T) rows of kSize
// elements. The 16-byte chunks of a row are permuted by an exclusive or with the row number, so that neither the copies
// nor the fragments' loads meet in a bank: eight rows of ldmatrix, or the 32 lanes of a float32 load, fall on 32 banks.
#pragma once
#include "common/cuda/convert.h"
#include "common/cuda/ptx_cp_async.h"
#include "common/cuda/ptx_matrix.h"
#include "gemm/gemm.h"

namespace fastlm::cuda {

constexpr int kGemmThreads = 128;
constexpr int kStageRow = 64;  // bytes of k in a stage: two steps of mma.sync m16n8k16, or of m16n8k8 for float32
constexpr int kStepBytes = 32;
constexpr int kChunk = 16;

template <class T>
constexpr int kDepth = kStageRow / static_cast<int>(sizeof(T));  // elements of k in a stage

template <class T, int kSize, bool kTransposed, bool kIsB>
struct OperandTile {
  static constexpr int kBytes = kSize * kStageRow;
  static constexpr int kRowBytes = kTransposed ? kSize * static_cast<int>(sizeof(T)) : kStageRow;
  static constexpr int kChunks = kRowBytes / kChunk;

  static FASTLM_DEVICE int offset(int row, int chunk) {
    const int permutation = !kTransposed ? row / 2 % 4 : sizeof(T) == 2 ? row % 8 : 2 * row % 8;
    return row * kRowBytes + (chunk ^ permutation) * kChunk;
  }

  // A fragment is 16 rows by one step of k, in four 8x8 matrices of 16-bit elements, or 8x4 of float32 ones: a register of
  // mma.sync each. Where matrix i lies: A has the two of the first half of k before the others, B those of the first rows,
  // so that two neighbouring registers are the operand of eight of the product's columns.
  static FASTLM_DEVICE int row_half(int i) { return kIsB ? i / 2 : i % 2; }
  static FASTLM_DEVICE int k_half(int i) { return kIsB ? i % 2 : i / 2; }

  // Where a lane reads the first fragment of rows `row` and up (a multiple of 32).
  static FASTLM_DEVICE int lane_offset(int row, int lane) {
    const int i = lane / 8;
    if constexpr (!kTransposed) {
      return offset(row + lane % 8 + 8 * row_half(i), k_half(i));
    } else if constexpr (sizeof(T) == 2) {
      return offset(lane % 8 + 8 * k_half(i), row / 8 + row_half(i));
    } else {
      return offset(lane % 4, (row + lane / 4) / 4) + lane / 4 % 4 * 4;
    }
  }

  // Fragment number `i` of 16 rows, at step `step` of the stage. The permutation makes every step in k, or in i, an
  // exclusive or of bits that the lane's own offset leaves zero.
  static FASTLM_DEVICE void fragment(uint32_t (&r)[4], const unsigned char* shared, uint32_t address, int lane_offset, int i,
                                     int step) {
    if constexpr (!kTransposed) {
      ptx::ldmatrix<4>(r, address + (lane_offset ^ step * kStepBytes) + i * 16 * kRowBytes);
    } else if constexpr (sizeof(T) == 2) {
      ptx::ldmatrix<4, true>(r, address + (lane_offset ^ i * 32) + step * 16 * kRowBytes);
    } else {
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const int at = (lane_offset ^ (i * 64 + row_half(j) * 32)) + (step * 8 + k_half(j) * 4) * kRowBytes;
        r[j] = *reinterpret_cast<const uint32_t*>(shared + at);
      }
    }
  }
};

// Fills an operand's tiles, one after the other along k. Every thread copies the same chunks of each: kCopies of them,
// kPass rows of the tile apart.
template <class T, int kSize, bool kTransposed, bool kAligned>
class OperandLoader {
  using Tile = OperandTile<T, kSize, kTransposed, false>;
  static constexpr int kCopies = Tile::kBytes / kChunk / kGemmThreads;
  static constexpr int kPass = kGemmThreads / Tile::kChunks;
  static constexpr int kElements = kChunk / static_cast<int>(sizeof(T));
  static_assert(kPass % 8 == 0, "all copies of a thread have the same permutation");

 public:
  // Tile rows 0 to half - 1 are matrix rows `first` and up, as far as there are `count` of them; the other rows of the
  // tile are matrix rows count + first and up, as far as 2 count: the second half of a gated weight. k: where it begins.
  FASTLM_DEVICE OperandLoader(const Matrix& p, int64_t first, int half, int64_t count, int64_t k)
      : row_(threadIdx.x / Tile::kChunks), chunk_(threadIdx.x % Tile::kChunks * kElements), half_(half), stride_(p.stride) {
    const int64_t left = count - first;
    left_ = left < half ? static_cast<int>(left) : half;
    whole_ = !kTransposed || left_ % kElements == 0;
    jump_ = count - half;
    to_ = Tile::offset(row_, chunk_ / kElements);
    const T* data = static_cast<const T*>(p.data);
    if constexpr (kTransposed) {
      const bool second = chunk_ >= half;
      from_ = data + (k + row_) * stride_ + first + chunk_ + (second ? jump_ : 0);
      left_ = max(0, min(kElements, left_ - (second ? chunk_ - half : chunk_)));
    } else {
      from_ = data + (first + row_) * stride_ + k + chunk_;
    }
  }

  // Starts the copy of the next tile, of which `left` elements of k exist; the rest is zero.
  FASTLM_DEVICE void copy(unsigned char* shared, uint32_t address, int64_t left) {
    if (kAligned && whole_ && left >= kDepth<T>) {
      copy_chunks([&](int to, const T* from, bool inside, int) { ptx::cp_async_16_if(inside, address + to, from); });
    } else {
      const int depth = left < kDepth<T> ? static_cast<int>(left) : kDepth<T>;
      copy_chunks([&](int to, const T* from, bool inside, int row) {
        const int present = !inside ? 0 : kTransposed ? (row < depth ? left_ : 0) : max(0, min(kElements, depth - chunk_));
        copy_some(shared + to, address + to, from, present);
      });
    }
    from_ += kTransposed ? kDepth<T> * stride_ : kDepth<T>;
  }

 private:
  // copy(place in the tile, source, whether anything of it is inside the matrix, row of the tile) for the thread's chunks
  template <class Copy>
  FASTLM_DEVICE void copy_chunks(Copy copy) {
#pragma unroll
    for (int i = 0; i < kCopies; i++) {
      const bool second = !kTransposed && i * kPass >= half_;
      const int row = row_ + i * kPass;
      const T* from = from_ + i * (kPass * stride_) + (second ? jump_ * stride_ : 0);
      copy(to_ + i * kPass * Tile::kRowBytes, from, kTransposed ? left_ > 0 : row - (second ? half_ : 0) < left_, row);
    }
  }

  // `present` elements of a chunk, and zeros.
  static FASTLM_DEVICE void copy_some(unsigned char* shared, uint32_t address, const T* from, int present) {
    if constexpr (kAligned) {
      ptx::cp_async_16(address, from, present * static_cast<int>(sizeof(T)));
    } else {
      alignas(16) T v[kElements];
#pragma unroll
      for (int j = 0; j < kElements; j++) v[j] = j < present ? from[j] : from_float<T>(0.0f);
      *reinterpret_cast<uint4*>(shared) = *reinterpret_cast<const uint4*>(v);
    }
  }

  const int row_, chunk_;  // of this thread's first chunk: row of the tile, element in the row
  int to_;                 // where it lies in the tile
  const int half_;
  int left_;               // rows of m or n that exist from `first` on, of one half; transposed: elements of the chunk
  bool whole_;             // no chunk of the tile ends outside the matrix, but for its rows' ends along k
  int64_t jump_;           // rows from the end of the first half to the second
  const int64_t stride_;
  const T* from_;
};

}  // namespace fastlm::cuda
