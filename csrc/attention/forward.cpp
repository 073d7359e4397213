// attention.h on the CPU, forward: blocks of rows go through the columns with an online softmax (Milakov, Gimelshein:
// Online normalizer calculation for softmax, arXiv:1805.02867; Dao: FlashAttention-2, arXiv:2307.08691).
//
// Where there are few rows (decoding) or few blocks of rows, the columns are cut into parts, whose results are put
// together in order. How many parts there are follows from the shapes alone. Tasks are ordered such that the heads of a
// part follow each other: in memory they lie side by side, and k and v are read nearly from front to back, page by
// page.
#include <cmath>

#include "attention/operands.h"
#include "attention/scores.h"
#include "common/simd.h"

namespace fastlm::FASTLM_ISA {
namespace {

constexpr int64_t kWantedTasks = 64;
constexpr int64_t kPart = 512;  // columns of a part; shorter ones cost more to put together than they save
constexpr int64_t kFewRows = 16;
constexpr int64_t kPartOfFew = 128;  // with so few rows: 128 columns of 12 heads of 64 floats are 0.8 MB of k and v

// The softmax of a block of rows over the columns seen so far: the unnormalised output, the running maximum and sum.
struct Partial {
  float* out;  // lanes x padded(D)
  float* maximum;
  float* sum;
  static int64_t floats(int64_t lanes, int64_t stride) { return lanes * stride + 2 * lanes; }
  Partial(float* at, int64_t lanes, int64_t stride) : out(at), maximum(at + lanes * stride), sum(maximum + lanes) {}
};

// In the place of -inf, where a row has seen nothing yet: exp(-inf - 0) is 0, exp(-inf + inf) would be NaN.
inline Vec finite(Vec maximum) {
  return if_less(set1(-kInfinity), maximum, maximum, if_less(maximum, zero(), zero(), maximum));
}

// Scores to weights exp(s - maximum); `decay` gets the factor on what was summed under the former maximum.
// `fetch(column)` is called once for each column.
template <class Fetch>
void online_softmax(int64_t columns, int64_t lanes, const Fetch& fetch, float* s, float* maximum, float* sum,
                    float* decay) {
  for (int64_t i = 0; i < lanes; i += Vec::size) {
    const Vec former = load(maximum + i);
    Vec even = former, odd = former;
    int64_t k = 0;
    for (; k + 2 <= columns; k += 2) {
      even = max(load(s + k * kRows + i), even);
      odd = max(load(s + (k + 1) * kRows + i), odd);
    }
    if (k < columns) even = max(load(s + k * kRows + i), even);
    const Vec largest = max(even, odd);
    store(maximum + i, largest);
    const Vec base = finite(largest), factor = exp_of_score(former - base);
    Vec total = load(sum + i) * factor;
    for (int64_t j = 0; j < columns; ++j) {
      if (i == 0) fetch(j);
      const Vec weight = exp_of_score(load(s + j * kRows + i) - base);
      store(s + j * kRows + i, weight);
      total += weight;
    }
    store(sum + i, total);
    store(decay + i, factor);
  }
}

void scale_rows(int64_t rows, int64_t stride, const float* factors, float* out) {
  for (int64_t i = 0; i < rows; ++i) {
    if (factors[i] == 1.0f) continue;
    const Vec factor = set1(factors[i]);
    for (int64_t d = 0; d < stride; d += Vec::size) store(out + i * stride + d, load(out + i * stride + d) * factor);
  }
}

struct ForwardBuffers {
  float *q, *scores, *keep, *k, *v, *decay;
  static int64_t floats(int64_t stride) {
    return kRows * stride + 2 * kRows * kColumns + 2 * kColumns * stride + kRows;
  }
  ForwardBuffers(float* at, int64_t stride)
      : q(at),
        scores(q + kRows * stride),
        keep(scores + kRows * kColumns),
        k(keep + kRows * kColumns),
        v(k + kColumns * stride),
        decay(v + kColumns * stride) {}
};

// With no more lanes than this, a product would fill its vectors of lanes with little: vectors run along D instead.
constexpr int64_t kDotLanes = 4;

// s[j * kRows + lane] = scale k_j . q_lane for a few lanes.
template <class T>
void dot_scores(int64_t columns, Matrix<T> k, Matrix<T> q, int64_t lanes, int64_t width, float scale, float* s) {
  using P = Products<T>;
  for (int64_t j0 = 0; j0 < columns; j0 += Vec::size) {
    for (int64_t lane = 0; lane < lanes; ++lane) {
      Vec sums[Vec::size];
      for (int64_t r = 0; r < Vec::size; ++r) {
        const T *row = k.data + std::min(j0 + r, columns - 1) * k.stride, *lane_row = q.data + lane * q.stride;
        sums[r] = zero();
        int64_t d = 0;
        for (; d + P::size <= width; d += P::size) sums[r] = P::add(P::load(row + d), P::load(lane_row + d), sums[r]);
        if (d < width) sums[r] = P::add(P::load_n(row + d, width - d), P::load_n(lane_row + d, width - d), sums[r]);
      }
      transpose(sums);
      for (int64_t step = Vec::size / 2; step > 0; step /= 2) {
        for (int64_t r = 0; r < step; ++r) sums[r] += sums[r + step];
      }
      float scores[Vec::size];
      store(scores, sums[0] * set1(scale));
      const int64_t count = std::min<int64_t>(Vec::size, columns - j0);
      for (int64_t r = 0; r < count; ++r) s[(j0 + r) * kRows + lane] = scores[r];
    }
  }
}

template <class Math>
void attend(const AttentionInputs& p, const RowBlock& block, const Lanes& lanes, int64_t kv_head, int64_t begin,
            int64_t end, const ForwardBuffers& buffers, const Partial& result) {
  const int64_t stride = padded(p.width);
  std::fill(result.maximum, result.maximum + lanes.padded, -kInfinity);
  std::fill(result.sum, result.sum + lanes.padded, 0.0f);
  if (begin >= end) {
    std::fill(result.out, result.out + lanes.count * stride, 0.0f);
    return;
  }
  const bool dot = lanes.count <= kDotLanes;
  float* rows = dot ? buffers.q : result.out;  // the output's place is still free
  const auto q = Math::lanes(p.q, p.type, p.q_strides, lanes, p.width, rows);
  Matrix<typename Math::Deep> q_turned{};
  if (dot) {
    over_block(kColumns, lanes.padded, [&](int64_t j, int64_t i) { store(buffers.scores + j * kRows + i, zero()); });
  } else {
    q_turned = Math::turned(q, lanes, p.width, p.scale, buffers.q);
  }
  const Use use_of_v = lanes.count <= kTileRows && p.width == stride ? Use::once : Use::often;
  const Fetcher next_k(p.k, p.type, p.k_strides, lanes.batch, kv_head, p.width);
  const Fetcher next_v(p.v, p.type, p.v_strides, lanes.batch, kv_head, p.width);
  for (int64_t j0 = begin; j0 < end; j0 += kColumns) {
    const int64_t columns = std::min(kColumns, end - j0);
    const Band band = band_of_rows(p, block, j0);
    float* s = buffers.scores;
    const auto columns_of = [&](const void* tensor, const Strides& strides, Use use, float* to) {
      return Math::columns(tensor, p.type, strides, lanes.batch, kv_head, j0, columns, p.width, use, to);
    };
    const auto k = columns_of(p.k, p.k_strides, Use::once, buffers.k);
    if (dot) {
      dot_scores(columns, k, q, lanes.count, p.width, p.scale, s);
    } else {
      product<Layout::rows>(columns, lanes.padded, p.width, k.data, k.stride, q_turned.data, q_turned.stride, s, kRows,
                            false, transposed(band));
      Math::scale(columns, lanes.padded, p.scale, s);
    }
    finish_scores(p, lanes, j0, columns, !sees_all(p, block, j0, columns), s, nullptr);
    const auto fetch = [&](int64_t j) __attribute__((always_inline)) {  // see prefetch()
      next_v.fetch(j0 + j);
      if (j0 + kColumns + j < end) next_k.fetch(j0 + kColumns + j);
    };
    online_softmax(columns, lanes.padded, fetch, s, result.maximum, result.sum, buffers.decay);
    if (p.rng_state != nullptr) {
      dropout_factors(p, lanes, j0, columns, buffers.keep);
      multiply(columns, lanes.padded, buffers.keep, s);
    }
    if (j0 > begin) scale_rows(lanes.count, stride, buffers.decay, result.out);
    const auto weights = Math::deep(Matrix<float>{s, kRows}, columns, lanes.padded, buffers.keep);
    const auto v = Math::deep(columns_of(p.v, p.v_strides, use_of_v, buffers.v), columns, p.width, buffers.v);
    product<Layout::columns>(lanes.count, stride, columns, weights.data, weights.stride, v.data, v.stride, result.out,
                             stride, j0 > begin, {}, band);
  }
}

void write_block(const AttentionInputs& p, const Lanes& lanes, const Partial& result, void* out, float* lse) {
  const int64_t stride = padded(p.width);
  for (int64_t i = 0; i < lanes.count; ++i) {
    const int64_t row = lanes.row[i], head = lanes.head[i];
    const float sum = result.sum[i];
    float* from = result.out + i * stride;
    if (sum == 0.0f) std::fill(from, from + stride, 0.0f);  // nothing to attend to
    write_row(from, sum == 0.0f ? 0.0f : 1.0f / sum, p.width, out, p.type,
              ((lanes.batch * p.rows + row) * p.heads + head) * p.width);
    lse[(lanes.batch * p.heads + head) * p.rows + row] = sum == 0.0f ? -kInfinity : result.maximum[i] + std::log(sum);
  }
}

// Adds the next part of a block of rows to the parts before it.
void combine(const Lanes& lanes, int64_t stride, const Partial& total, const Partial& next) {
  float total_factor[kRows], next_factor[kRows];
  for (int64_t i = 0; i < lanes.padded; i += Vec::size) {
    const Vec a = load(total.maximum + i), b = load(next.maximum + i), largest = max(b, a), base = finite(largest);
    const Vec factor_a = exp_of_score(a - base), factor_b = exp_of_score(b - base);
    store(total.sum + i, fma(load(total.sum + i), factor_a, load(next.sum + i) * factor_b));
    store(total.maximum + i, largest);
    store(total_factor + i, factor_a);
    store(next_factor + i, factor_b);
  }
  for (int64_t i = 0; i < lanes.count; ++i) {
    const Vec factor_a = set1(total_factor[i]), factor_b = set1(next_factor[i]);
    for (int64_t d = i * stride; d < (i + 1) * stride; d += Vec::size) {
      store(total.out + d, fma(load(total.out + d), factor_a, load(next.out + d) * factor_b));
    }
  }
}

template <class Math>
void attention_forward(const AttentionInputs& p, void* out, float* lse) {
  const int64_t stride = padded(p.width), buffers = ForwardBuffers::floats(stride);
  const std::vector<RowBlock> blocks = row_blocks(p);
  const int64_t count = static_cast<int64_t>(blocks.size()), places = count * p.batch * p.kv_heads;
  if (places == 0) return;
  int64_t lanes_of_all = 0;  // of the largest block
  for (const RowBlock& block : blocks) lanes_of_all = std::max(lanes_of_all, padded(block.rows * block.heads));
  const bool few = lanes_of_all <= padded(kFewRows);
  const int64_t parts =
      std::max<int64_t>(1, few ? p.columns / kPartOfFew : std::min(kWantedTasks / places, p.columns / kPart));
  const int64_t floats = Partial::floats(lanes_of_all, stride);
  const int64_t work = 2 * p.batch * p.kv_heads * scores_of(blocks) * stride;

  if (parts == 1) {  // the blocks of a head follow each other, the longest first
    for_each_task(places, work, buffers + floats, [&](int64_t task, float* buffer) {
      const RowBlock& block = blocks[count - 1 - task % count];
      const int64_t head = task / count % p.kv_heads;
      const Partial result(buffer + buffers, lanes_of_all, stride);
      Lanes lanes;
      set_lanes(p, block, task / count / p.kv_heads, head, lanes);
      attend<Math>(p, block, lanes, head, block.first_column, block.end_column, ForwardBuffers(buffer, stride), result);
      write_block(p, lanes, result, out, lse);
    });
    return;
  }
  const std::unique_ptr<float[]> partials(new float[places * parts * floats]);
  const auto partial = [&](int64_t batch_and_block, int64_t part, int64_t head) {
    const int64_t index = (batch_and_block * parts + part) * p.kv_heads + head;
    return Partial(partials.get() + index * floats, lanes_of_all, stride);
  };
  for_each_task(places * parts, work, buffers, [&](int64_t task, float* buffer) {
    const int64_t head = task % p.kv_heads, part = task / p.kv_heads % parts,
                  batch_and_block = task / p.kv_heads / parts;
    const RowBlock& block = blocks[batch_and_block % count];
    const int64_t length = ceil_divide(block.end_column - block.first_column, parts * kColumns) * kColumns;
    const int64_t begin = std::min(block.end_column, block.first_column + part * length);
    const int64_t end = std::min(block.end_column, begin + length);
    Lanes lanes;
    set_lanes(p, block, batch_and_block / count, head, lanes);
    attend<Math>(p, block, lanes, head, begin, end, ForwardBuffers(buffer, stride),
                 partial(batch_and_block, part, head));
  });
  for_each_task(places, places * parts * lanes_of_all * stride, 0, [&](int64_t task, float*) {
    const int64_t head = task % p.kv_heads, batch_and_block = task / p.kv_heads;
    Lanes lanes;
    set_lanes(p, blocks[batch_and_block % count], batch_and_block / count, head, lanes);
    const Partial total = partial(batch_and_block, 0, head);
    for (int64_t part = 1; part < parts; ++part) combine(lanes, stride, total, partial(batch_and_block, part, head));
    write_block(p, lanes, total, out, lse);
  });
}

}  // namespace

void attention_forward_cpu(const AttentionInputs& p, void* out, float* lse) {
#if defined(FASTLM_PAIRS_OF_BF16)
  if (Pairs::take(p)) return attention_forward<Pairs>(p, out, lse);
#endif
  attention_forward<Floats>(p, out, lse);
}

}  // namespace fastlm::FASTLM_ISA

FASTLM_DISPATCH_BF16(attention_forward_cpu, (const AttentionInputs& p, void* out, float* lse), (p, out, lse))
