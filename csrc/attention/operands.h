// What the products of a block of attention multiply: floats (Floats), or, where the processor multiplies bf16 numbers
// two by two, q, k, v and dout as they lie in memory and weights rounded to bf16 (Pairs; small_product.h). Sums are
// floats both ways.
//
//   lanes(tensor, ...)    the lanes' rows of q or dout, zeros up to the padded width and the padded number of lanes
//   columns(tensor, ...)  rows of k or v
//   turned(rows, ...)     lanes turned round, element (d, lane): B of a product over d. Floats have `factor` in them
//   scale(result, ...)    the factor that Pairs do not have in them, for the result
//   rounded(weights, ...) element (j, lane): A of a product over lanes
//   deep(rows, ...)       the rows as B of a product over them; weights as A (Layout::columns) of one over columns
#pragma once
#include <cstring>

#include "attention/blocks.h"

namespace fastlm::FASTLM_ISA {

struct Floats {
  using Deep = float;

  static Matrix<float> lanes(const void* tensor, DType type, const Strides& strides, const Lanes& lanes, int64_t width,
                             float* to) {
    read_lanes(tensor, type, strides, lanes, width, to);
    return {to, padded(width)};
  }
  static Matrix<float> columns(const void* tensor, DType type, const Strides& strides, int64_t batch, int64_t head,
                               int64_t first, int64_t count, int64_t width, Use use, float* buffer) {
    return rows_of(tensor, type, strides, batch, head, first, count, width, use, buffer);
  }
  static Matrix<float> turned(Matrix<float> rows, const Lanes& lanes, int64_t width, float factor, float* to) {
    transpose_lanes(rows.data, lanes, width, factor, to);
    return {to, kRows};
  }
  static void scale(int64_t, int64_t, float, float*) {}
  static Matrix<float> rounded(int64_t, const Lanes&, const float* weights, float*) { return {weights, kRows}; }
  static Matrix<float> deep(Matrix<float> rows, int64_t, int64_t, float*) { return rows; }
};

#if defined(FASTLM_PAIRS_OF_BF16)

// Each buffer is as large as that of Floats.
struct Pairs {
  static bool take(const AttentionInputs& p) { return p.type == DType::bf16 && p.width % 2 == 0; }

  using Deep = Pair;

  static Matrix<bf16> lanes(const void* tensor, DType, const Strides& strides, const Lanes& lanes, int64_t width,
                            float* buffer) {
    constexpr int64_t size = Products<bf16>::size;
    const int64_t stride = (width + size - 1) / size * size;  // whole vectors of pairs, for turned()
    bf16* to = reinterpret_cast<bf16*>(buffer);
    std::memset(to, 0, lanes.padded * stride * sizeof(bf16));
    if (tensor == nullptr) return {to, stride};
    for (int64_t i = 0; i < lanes.count; ++i) {
      const int64_t offset = lanes.batch * strides.batch + lanes.head[i] * strides.head + lanes.row[i] * strides.row;
      std::memcpy(to + i * stride, static_cast<const bf16*>(tensor) + offset, width * sizeof(bf16));
    }
    return {to, stride};
  }
  static Matrix<bf16> columns(const void* tensor, DType, const Strides& strides, int64_t batch, int64_t head,
                              int64_t first, int64_t, int64_t, Use, float*) {
    const int64_t offset = batch * strides.batch + head * strides.head + first * strides.row;
    return {static_cast<const bf16*>(tensor) + offset, strides.row};
  }
  static Matrix<Pair> turned(Matrix<bf16> rows, const Lanes& lanes, int64_t, float, float* to) {
    // a pair has the size of a float, and moving floats does not change their bits
    const float* pairs = reinterpret_cast<const float*>(rows.data);
    const int64_t stride = rows.stride / 2;
    for (int64_t i = 0; i < lanes.padded; i += Vec::size) {
      for (int64_t d = 0; d < stride; d += Vec::size) {
        Vec square[Vec::size];
        for (int64_t r = 0; r < Vec::size; ++r) square[r] = load(pairs + (i + r) * stride + d);
        transpose(square);
        for (int64_t r = 0; r < Vec::size; ++r) store(to + (d + r) * kRows + i, square[r]);
      }
    }
    return {reinterpret_cast<const Pair*>(to), kRows};
  }
  static void scale(int64_t columns, int64_t lanes, float factor, float* s) {
    for (int64_t j = 0; j < columns; ++j) {
      for (int64_t i = j * kRows; i < j * kRows + lanes; i += Vec::size) store(s + i, load(s + i) * set1(factor));
    }
  }
  static Matrix<bf16> rounded(int64_t columns, const Lanes& lanes, const float* weights, float* buffer) {
    bf16* to = reinterpret_cast<bf16*>(buffer);
    for (int64_t j = 0; j < columns; ++j) {
      for (int64_t i = j * kRows; i < j * kRows + lanes.padded; i += Vec::size) store(to + i, load(weights + i));
      if (lanes.count % 2 != 0) to[j * kRows + lanes.count] = {0};
    }
    return {to, kRows};
  }
  template <class T>
  static Matrix<Pair> deep(Matrix<T> rows, int64_t count, int64_t width, float* buffer) {
    const int64_t stride = padded(width);
    Pair* to = reinterpret_cast<Pair*>(buffer);
    for (int64_t r = 0; r < count; r += 2) {
      const T *first = rows.data + r * rows.stride, *second = r + 1 < count ? first + rows.stride : nullptr;
      for (int64_t d = 0; d < width; d += Vec::size) {
        const __mmask16 n = d + Vec::size <= width ? 0xffff : FASTLM_ISA::first(width - d);
        interleave(first + d, second == nullptr ? nullptr : second + d, n, to + r / 2 * stride + d);
      }
    }
    return {to, stride};
  }
};

#endif

}  // namespace fastlm::FASTLM_ISA
