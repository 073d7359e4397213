// Products of tiles by mma.sync, for 16-bit types and, as 3xTF32, for float32. A warp owns rows of the result: 16 for
// each row tile, whose accumulators acc[n][e] hold, in lane 4 g + t, columns 8 n + 2 t + e % 2 of row g + 8 (e / 2).
#pragma once
#include "attention/sm80/tile.h"
#include "common/cuda/ptx_math.h"
#include "common/cuda/ptx_matrix.h"

namespace fastlm::cuda {

FASTLM_DEVICE int lane_id() { return threadIdx.x & 31; }

FASTLM_DEVICE uint32_t pack(float low, float high, __nv_bfloat16) { return ptx::pack_bf16(low, high); }
FASTLM_DEVICE uint32_t pack(float low, float high, __half) { return ptx::pack_f16(low, high); }

// 16-bit operands by ldmatrix. kDepth: the length of the inner dimension of one mma.
template <class T>
struct Operands {
  static constexpr int kDepth = 16;
  struct A {
    uint32_t r[4];
  };
  struct B {  // two neighbouring tiles of eight columns
    uint32_t r[4];
  };

  // The address of chunk 2 step + (0 or 1), where `start` is that of step 0. The swizzle touches the chunk's last three
  // bits alone, so a step flips bits of an address that is computed once.
  static FASTLM_DEVICE uint32_t step_address(uint32_t start, int step) {
    return (start ^ ((2 * step & 7) << 4)) + (2 * step >> 3) * 128;
  }

  // a: rows row..row + 15 of the tile, elements 16 step.. of each.
  template <class Tile>
  static FASTLM_DEVICE void rows_of_a(A& a, const Tile& tile, int row, int step) {
    const int l = lane_id();
    ptx::ldmatrix(a.r, step_address(tile.address + tile.offset(row + (l & 15), l >> 4), step));
  }
  // a transposed: its rows are columns column..column + 15 of the tile, its inner dimension rows 16 step..
  template <class Tile>
  static FASTLM_DEVICE void columns_of_a(A& a, const Tile& tile, int column, int step) {
    const int l = lane_id();
    ptx::ldmatrix<4, true>(a.r, tile.address + tile.offset(step * 16 + (l & 7) + (l >> 4) * 8, column / 8 + (l >> 3 & 1)));
  }
  // b's columns are rows row..row + 15 of the tile; its inner dimension runs along them.
  template <class Tile>
  static FASTLM_DEVICE void rows_of_b(B& b, const Tile& tile, int row, int step) {
    const int l = lane_id();
    ptx::ldmatrix(b.r, step_address(tile.address + tile.offset(row + (l & 7) + (l >> 4) * 8, l >> 3 & 1), step));
  }
  // b's rows are rows 16 step.. of the tile; its columns are the tile's from 16 pair on.
  template <class Tile>
  static FASTLM_DEVICE void columns_of_b(B& b, const Tile& tile, int step, int pair) {
    const int l = lane_id();
    ptx::ldmatrix<4, true>(b.r, step_address(tile.address + tile.offset(step * 16 + (l & 15), l >> 4), pair));
  }
  // Accumulators become an operand without leaving their lanes.
  template <int kTiles>
  static FASTLM_DEVICE void from_accumulators(A& a, const float (&c)[kTiles][4], int step) {
    const auto& low = c[2 * step];
    const auto& high = c[2 * step + 1];
    a.r[0] = pack(low[0], low[1], T());
    a.r[1] = pack(low[2], low[3], T());
    a.r[2] = pack(high[0], high[1], T());
    a.r[3] = pack(high[2], high[3], T());
  }
  static FASTLM_DEVICE void multiply(float (&d)[4], const A& a, const B& b, int tile) {
    if constexpr (sizeof(T) == 2) {
      const uint32_t b0 = b.r[2 * tile], b1 = b.r[2 * tile + 1];
      if constexpr (std::is_same_v<T, __half>) ptx::mma_f16(d, a.r, b0, b1);
      else ptx::mma_bf16(d, a.r, b0, b1);
    }
  }
};

// float32: each value is the sum of two tf32, and of the four products of two values only the smallest is left out.
template <>
struct Operands<float> {
  static constexpr int kDepth = 8;
  struct A {
    uint32_t large[4], small[4];
  };
  struct B {
    uint32_t large[4], small[4];
  };

  static FASTLM_DEVICE void split(float v, uint32_t& large, uint32_t& small) {
    large = ptx::to_tf32(v);
    small = ptx::to_tf32(v - __uint_as_float(large));
  }
  template <class Tile>
  static FASTLM_DEVICE float at(const Tile& tile, int row, int chunk, int element) {
    return *reinterpret_cast<const float*>(tile.data + tile.offset(row, chunk) + 4 * element);
  }

  template <class Tile>
  static FASTLM_DEVICE void rows_of_a(A& a, const Tile& tile, int row, int step) {
    const int g = lane_id() >> 2, t = lane_id() & 3;
#pragma unroll
    for (int i = 0; i < 4; i++) split(at(tile, row + g + (i & 1) * 8, 2 * step + (i >> 1), t), a.large[i], a.small[i]);
  }
  template <class Tile>
  static FASTLM_DEVICE void rows_of_b(B& b, const Tile& tile, int row, int step) {
    const int g = lane_id() >> 2, t = lane_id() & 3;
#pragma unroll
    for (int i = 0; i < 4; i++) split(at(tile, row + g + (i >> 1) * 8, 2 * step + (i & 1), t), b.large[i], b.small[i]);
  }
  // The inner dimension may be taken in any order that both operands share: even places first, then the odd ones, is
  // that in which lanes hold accumulators.
  template <class Tile>
  static FASTLM_DEVICE void columns_of_b(B& b, const Tile& tile, int step, int pair) {
    const int g = lane_id() >> 2, t = lane_id() & 3;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int chunk = 4 * pair + 2 * (i >> 1) + (g >> 2);
      split(at(tile, step * 8 + 2 * t + (i & 1), chunk, g & 3), b.large[i], b.small[i]);
    }
  }
  template <int kTiles>
  static FASTLM_DEVICE void from_accumulators(A& a, const float (&c)[kTiles][4], int step) {
    constexpr int kOrder[4] = {0, 2, 1, 3};
#pragma unroll
    for (int i = 0; i < 4; i++) split(c[step][kOrder[i]], a.large[i], a.small[i]);
  }
  static FASTLM_DEVICE void multiply(float (&d)[4], const A& a, const B& b, int tile) {
    float sum[4] = {};  // of a step alone: tensor cores cut off what a sum rounds away
    ptx::mma_tf32(sum, a.small, b.large[2 * tile], b.large[2 * tile + 1]);
    ptx::mma_tf32(sum, a.large, b.small[2 * tile], b.small[2 * tile + 1]);
    ptx::mma_tf32(sum, a.large, b.large[2 * tile], b.large[2 * tile + 1]);
#pragma unroll
    for (int e = 0; e < 4; e++) d[e] += sum[e];
  }
};

// acc[r] = rows row + 16 r.. of a, times the first 8 kTiles rows of b transposed.
template <int kMostUnrolled = 16, class T, int kWidth, int kRowTiles, int kTiles>
FASTLM_DEVICE void rows_by_rows(float (&acc)[kRowTiles][kTiles][4], const Tile<T, kWidth>& a, int row, const Tile<T, kWidth>& b) {
  using Op = Operands<T>;
  constexpr int kSteps = kWidth / Op::kDepth, kUnroll = sizeof(T) == 4 ? 2 : kSteps < kMostUnrolled ? kSteps : kMostUnrolled;
#pragma unroll
  for (int r = 0; r < kRowTiles; r++) {
#pragma unroll
    for (int n = 0; n < kTiles; n++) {
#pragma unroll
      for (int e = 0; e < 4; e++) acc[r][n][e] = 0.0f;
    }
  }
#pragma unroll kUnroll
  for (int step = 0; step < kSteps; step++) {
    typename Op::A a_part[kRowTiles];
#pragma unroll
    for (int r = 0; r < kRowTiles; r++) Op::rows_of_a(a_part[r], a, row + 16 * r, step);
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {
      typename Op::B b_part;
      Op::rows_of_b(b_part, b, 8 * n, step);
#pragma unroll
      for (int r = 0; r < kRowTiles; r++) {
        Op::multiply(acc[r][n], a_part[r], b_part, 0);
        Op::multiply(acc[r][n + 1], a_part[r], b_part, 1);
      }
    }
  }
}

// Weights as operands: rounded to T, and half as many registers.
template <class T, int kInner>
struct Weights {
  static constexpr int kSteps = 8 * kInner / Operands<T>::kDepth;
  typename Operands<T>::A part[kSteps];
  FASTLM_DEVICE void set(const float (&weights)[kInner][4]) {
#pragma unroll
    for (int step = 0; step < kSteps; step++) Operands<T>::from_accumulators(part[step], weights, step);
  }
};

// acc[r] += weights[r] b: columns 8 first.. 8 (first + kTiles) of its first 8 kInner rows.
template <class T, int kWidth, int kRowTiles, int kInner, int kTiles>
FASTLM_DEVICE void weights_by_columns(float (&acc)[kRowTiles][kTiles][4], const Weights<T, kInner> (&weights)[kRowTiles],
                                      const Tile<T, kWidth>& b, int first = 0) {
  using Op = Operands<T>;
#pragma unroll
  for (int step = 0; step < Weights<T, kInner>::kSteps; step++) {
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {
      typename Op::B b_part;
      Op::columns_of_b(b_part, b, step, (first + n) / 2);
#pragma unroll
      for (int r = 0; r < kRowTiles; r++) {
        Op::multiply(acc[r][n], weights[r].part[step], b_part, 0);
        Op::multiply(acc[r][n + 1], weights[r].part[step], b_part, 1);
      }
    }
  }
}

// acc[r] += rows row + 16 r.. of a, or of a transposed, over kInner of its elements, times columns 8 first.. of b.
template <bool kTransposed, int kInner, class T, int kWidthA, int kWidthB, int kRowTiles, int kTiles>
FASTLM_DEVICE void tile_by_columns(float (&acc)[kRowTiles][kTiles][4], const Tile<T, kWidthA>& a, int row,
                                   const Tile<T, kWidthB>& b, int first) {
  using Op = Operands<T>;
#pragma unroll
  for (int step = 0; step < kInner / Op::kDepth; step++) {
    typename Op::A a_part[kRowTiles];
#pragma unroll
    for (int r = 0; r < kRowTiles; r++) {
      if constexpr (kTransposed) Op::columns_of_a(a_part[r], a, row + 16 * r, step);
      else Op::rows_of_a(a_part[r], a, row + 16 * r, step);
    }
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {
      typename Op::B b_part;
      Op::columns_of_b(b_part, b, step, (first + n) / 2);
#pragma unroll
      for (int r = 0; r < kRowTiles; r++) {
        Op::multiply(acc[r][n], a_part[r], b_part, 0);
        Op::multiply(acc[r][n + 1], a_part[r], b_part, 1);
      }
    }
  }
}

// factor * acc, rounded to T, to rows row.. of a tile, columns 8 first.. of each.
template <class T, int kWidth, int kTiles>
FASTLM_DEVICE void put_rows(Tile<T, kWidth> tile, int row, const float (&acc)[kTiles][4], float factor_low, float factor_high,
                            int first = 0) {
  const int g = lane_id() >> 2, t = lane_id() & 3;
#pragma unroll
  for (int n = 0; n < kTiles; n++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const float factor = half == 0 ? factor_low : factor_high;
      const float x = factor * acc[n][2 * half], y = factor * acc[n][2 * half + 1];
      const int r = row + g + 8 * half;
      if constexpr (sizeof(T) == 4) {
        *reinterpret_cast<float2*>(tile.data + tile.offset(r, 2 * (first + n) + (t >> 1)) + 8 * (t & 1)) = make_float2(x, y);
      } else {
        *reinterpret_cast<uint32_t*>(tile.data + tile.offset(r, first + n) + 4 * t) = pack(x, y, T());
      }
    }
  }
}

}  // namespace fastlm::cuda
