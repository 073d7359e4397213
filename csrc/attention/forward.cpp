// attention.h on the CPU, forward: blocks of rows go through the columns with an online softmax (Milakov, Gimelshein:
// Online normalizer calculation for softmax, arXiv:1805.02867; Dao: FlashAttention-2, arXiv:2307.08691).
//
// Where the blocks of rows are too few for the threads of a large machine (decoding), the columns are cut into parts, whose
// results are put together in order. How many parts there are follows from the shapes alone.
#include <cmath>

#include "attention/scores.h"
#include "common/simd.h"

namespace fastlm::FASTLM_ISA {
namespace {

constexpr int64_t kWantedTasks = 64;
constexpr int64_t kShortestPart = 512;  // columns; below, putting parts together costs more than it saves

// The softmax of a block of rows over the columns seen so far: the unnormalised output, the running maximum and sum.
struct Partial {
  float* out;  // kRows x padded(D)
  float* maximum;
  float* sum;
};

int64_t partial_floats(int64_t stride) { return kRows * stride + 2 * kRows; }
Partial partial_at(float* at, int64_t stride) { return {at, at + kRows * stride, at + kRows * stride + kRows}; }

// In the place of -inf, where a row has seen nothing yet: exp(-inf - 0) is 0, exp(-inf + inf) would be NaN.
inline Vec finite(Vec maximum) { return if_less(set1(-kInfinity), maximum, maximum, if_less(maximum, zero(), zero(), maximum)); }

// Scores to weights exp(s - maximum); `decay` gets the factor on what was summed under the former maximum.
void online_softmax(int64_t columns, int64_t lanes, float* s, float* maximum, float* sum, float* decay) {
  for (int64_t i = 0; i < lanes; i += Vec::size) {
    const Vec former = load(maximum + i);
    Vec largest = former;
    for (int64_t j = 0; j < columns; ++j) largest = max(load(s + j * kRows + i), largest);
    store(maximum + i, largest);
    const Vec base = finite(largest), factor = exp(former - base);
    Vec total = load(sum + i) * factor;
    for (int64_t j = 0; j < columns; ++j) {
      const Vec weight = exp(load(s + j * kRows + i) - base);
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
  static int64_t floats(int64_t stride) { return kRows * stride + 2 * kRows * kColumns + 2 * kColumns * stride + kRows; }
  ForwardBuffers(float* at, int64_t stride)
      : q(at),
        scores(q + kRows * stride),
        keep(scores + kRows * kColumns),
        k(keep + kRows * kColumns),
        v(k + kColumns * stride),
        decay(v + kColumns * stride) {}
};

void attend(const AttentionInputs& p, const RowBlock& block, const Lanes& lanes, int64_t kv_head, int64_t begin, int64_t end,
            const ForwardBuffers& buffers, const Partial& result) {
  const int64_t stride = padded(p.width);
  std::fill(result.maximum, result.maximum + kRows, -kInfinity);
  std::fill(result.sum, result.sum + kRows, 0.0f);
  if (begin >= end) {
    std::fill(result.out, result.out + lanes.count * stride, 0.0f);
    return;
  }
  read_lanes(p.q, p.type, p.q_strides, lanes, p.width, result.out);  // the output's place is still free
  transpose_lanes(result.out, lanes, p.width, p.scale, buffers.q);
  const Use use_of_v = lanes.count <= kTileRows && p.width == stride ? Use::once : Use::often;
  for (int64_t j0 = begin; j0 < end; j0 += kColumns) {
    const int64_t columns = std::min(kColumns, end - j0);
    const Band band = band_of_rows(p, block, j0);
    float* s = buffers.scores;
    const View k =
        rows_of(p.k, p.type, p.k_strides, lanes.batch, kv_head, j0, columns, p.width, Use::once, buffers.k);
    product<Layout::rows>(columns, lanes.padded, p.width, k.data, k.stride, buffers.q, kRows, s, kRows, false,
                          transposed(band));
    finish_scores(p, lanes, j0, columns, !sees_all(p, block, j0, columns), s, nullptr);
    online_softmax(columns, lanes.padded, s, result.maximum, result.sum, buffers.decay);
    if (p.rng_state != nullptr) {
      dropout_factors(p, lanes, j0, columns, buffers.keep);
      multiply(columns, lanes.padded, buffers.keep, s);
    }
    if (j0 > begin) scale_rows(lanes.count, stride, buffers.decay, result.out);
    const View v =
        rows_of(p.v, p.type, p.v_strides, lanes.batch, kv_head, j0, columns, p.width, use_of_v, buffers.v);
    product<Layout::columns>(lanes.count, stride, columns, s, kRows, v.data, v.stride, result.out, stride, j0 > begin, {},
                             band);
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

// The parts of a block of rows, in order, put together in the first.
void combine(const Lanes& lanes, int64_t parts, int64_t stride, float* partials) {
  const Partial total = partial_at(partials, stride);
  float factors[kRows];
  for (int64_t part = 1; part < parts; ++part) {
    const Partial next = partial_at(partials + part * partial_floats(stride), stride);
    for (int64_t i = 0; i < lanes.padded; i += Vec::size) {
      const Vec a = load(total.maximum + i), b = load(next.maximum + i), largest = max(b, a), base = finite(largest);
      const Vec factor_a = exp(a - base), factor_b = exp(b - base);
      store(total.sum + i, fma(load(total.sum + i), factor_a, load(next.sum + i) * factor_b));
      store(total.maximum + i, largest);
      store(factors + i, factor_b);
      store(next.maximum + i, factor_a);
    }
    for (int64_t i = 0; i < lanes.count; ++i) {
      const Vec factor_a = set1(next.maximum[i]), factor_b = set1(factors[i]);
      for (int64_t d = i * stride; d < (i + 1) * stride; d += Vec::size) {
        store(total.out + d, fma(load(total.out + d), factor_a, load(next.out + d) * factor_b));
      }
    }
  }
}

}  // namespace

void attention_forward_cpu(const AttentionInputs& p, void* out, float* lse) {
  const int64_t stride = padded(p.width);
  const std::vector<RowBlock> blocks = row_blocks(p);
  const int64_t count = static_cast<int64_t>(blocks.size()), places = count * p.batch * p.kv_heads;
  if (places == 0) return;
  const int64_t parts = std::clamp<int64_t>(std::min(kWantedTasks / places, p.columns / kShortestPart), 1, kWantedTasks);

  // A place is a block of rows at a head of a batch entry; the blocks of a head follow each other, the longest first
  const auto locate = [&](int64_t place, Lanes& lanes, int64_t& kv_head) -> const RowBlock& {
    const RowBlock& block = blocks[count - 1 - place % count];
    kv_head = place / count % p.kv_heads;
    set_lanes(p, block, place / count / p.kv_heads, kv_head, lanes);
    return block;
  };
  const int64_t buffers = ForwardBuffers::floats(stride);
  if (parts == 1) {
    for_each_task(places, buffers + partial_floats(stride), [&](int64_t task, float* buffer) {
      Lanes lanes;
      int64_t kv_head;
      const RowBlock& block = locate(task, lanes, kv_head);
      const Partial result = partial_at(buffer + buffers, stride);
      attend(p, block, lanes, kv_head, block.first_column, block.end_column, ForwardBuffers(buffer, stride), result);
      write_block(p, lanes, result, out, lse);
    });
    return;
  }
  const std::unique_ptr<float[]> partials(new float[places * parts * partial_floats(stride)]);
  for_each_task(places * parts, buffers, [&](int64_t task, float* buffer) {
    Lanes lanes;
    int64_t kv_head;
    const int64_t part = task % parts;
    const RowBlock& block = locate(task / parts, lanes, kv_head);
    const int64_t length = ceil_divide(block.end_column - block.first_column, parts * kColumns) * kColumns;
    const int64_t begin = std::min(block.end_column, block.first_column + part * length);
    const int64_t end = std::min(block.end_column, begin + length);
    attend(p, block, lanes, kv_head, begin, end, ForwardBuffers(buffer, stride),
           partial_at(partials.get() + task * partial_floats(stride), stride));
  });
  for_each_task(places, 0, [&](int64_t place, float*) {
    Lanes lanes;
    int64_t kv_head;
    locate(place, lanes, kv_head);
    float* first = partials.get() + place * parts * partial_floats(stride);
    combine(lanes, parts, stride, first);
    write_block(p, lanes, partial_at(first, stride), out, lse);
  });
}

}  // namespace fastlm::FASTLM_ISA

FASTLM_DISPATCH(attention_forward_cpu, (const AttentionInputs& p, void* out, float* lse), (p, out, lse))
