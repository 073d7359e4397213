// attention.h on the CPU, backward: the weights are computed again from q, k and lse (Dao: FlashAttention-2,
// arXiv:2307.08691).
//
//   delta_i = dout_i . out_i - dlse_i            dp[i, j] = keep[i, j] dout_i . v_j
//   ds[i, j] = p[i, j] (dp[i, j] - delta_i)
//   dv_j = sum_i keep p dout_i,   dk_j = scale sum_i ds q_i,   dq_i = scale sum_j ds k_j
//
// A task is one head of k and v: it goes through the blocks of rows in order and adds to dk and dv, which nobody else
// touches. Where there are few heads, the blocks are dealt out to several tasks, each with its own sums, which are
// added in order at the end. How many follows from the shapes alone.
#include <cstring>

#include "attention/operands.h"
#include "attention/scores.h"
#include "common/simd.h"

namespace fastlm::FASTLM_ISA {
namespace {

constexpr int64_t kWantedTasks = 16;
constexpr int64_t kMostSharedFloats = 64 << 20;  // 256 MB for the sums of all tasks

struct BackwardBuffers {
  float *q, *q_turned, *q_deep, *dout, *dout_turned, *dout_deep, *dq, *k, *v;
  float *weights, *weights_rounded, *dscores, *dscores_rounded, *dscores_deep, *keep, *slope, *lse, *delta, *dlse;
  static int64_t floats(int64_t stride) { return 9 * kRows * stride + 7 * kRows * kColumns + 3 * kRows; }
  BackwardBuffers(float* at, int64_t stride) {
    const auto take = [&](int64_t n) {
      float* here = at;
      at += n;
      return here;
    };
    for (float** rows : {&q, &q_turned, &q_deep, &dout, &dout_turned, &dout_deep, &dq, &k, &v}) {
      *rows = take(kRows * stride);
    }
    for (float** block : {&weights, &weights_rounded, &dscores, &dscores_rounded, &dscores_deep, &keep, &slope}) {
      *block = take(kRows * kColumns);
    }
    for (float** row : {&lse, &delta, &dlse}) *row = take(kRows);
  }
};
static_assert(kRows == kColumns, "one size serves the rows of q and those of k and v");

// lse and delta of the lanes.
void read_statistics(const AttentionInputs& p, const AttentionGradients& g, const Lanes& lanes,
                     const BackwardBuffers& buffers) {
  for (int64_t i = 0; i < lanes.padded; ++i) {
    const int64_t row = lanes.row[i], head = lanes.head[i], at = (lanes.batch * p.heads + head) * p.rows + row;
    Vec dot = zero();
    with_type(p.type, [&](auto t) {
      using T = decltype(t);
      if (g.dout == nullptr) return;
      const T* out = static_cast<const T*>(g.out) + ((lanes.batch * p.rows + row) * p.heads + head) * p.width;
      const Strides& s = g.dout_strides;
      const T* dout = static_cast<const T*>(g.dout) + lanes.batch * s.batch + row * s.row + head * s.head;
      int64_t d = 0;
      for (; d + Vec::size <= p.width; d += Vec::size) dot = fma(load(dout + d), load(out + d), dot);
      if (d < p.width) dot = fma(load_n(dout + d, p.width - d), load_n(out + d, p.width - d), dot);
    });
    // A row with nothing to attend to has scores of -inf: any finite lse makes its weights zero
    buffers.lse[i] = g.lse[at] == -kInfinity ? 0.0f : g.lse[at];
    buffers.dlse[i] = g.dlse == nullptr ? 0.0f : g.dlse[at];
    buffers.delta[i] = sum(dot) - buffers.dlse[i];
  }
}

// Scores and dp to weights (with dropout) and scale * ds. `whole`: these are all the columns that the rows see.
// `fetch(column)` is called once for each column.
template <class Fetch>
void differentiate(const AttentionInputs& p, int64_t columns, int64_t lanes, bool whole, const BackwardBuffers& buffers,
                   const Fetch& fetch) {
  const Vec scale = set1(p.scale);
  const bool dropout = p.rng_state != nullptr, capped = p.softcap > 0.0f;
  for (int64_t i = 0; i < lanes; i += Vec::size) {
    const Vec lse = load(buffers.lse + i);
    Vec delta = zero(), total = zero();
    for (int64_t j = 0; j < columns; ++j) {
      const int64_t at = j * kRows + i;
      if (i == 0) fetch(j);
      const Vec weight = exp_of_score(load(buffers.weights + at) - lse);
      store(buffers.weights + at, weight);
      Vec dweight = load(buffers.dscores + at);
      if (dropout) {
        dweight = dweight * load(buffers.keep + at);
        store(buffers.dscores + at, dweight);
      }
      delta = fma(weight, dweight, delta);
      total += weight;
    }
    // dout . out is the same sum, but rounded otherwise than dp. For a row that has most of its weight on one column,
    // ds is the difference of two nearly equal numbers, and that matters; such rows see few columns as a rule. Divided
    // by the sum of the weights, which is 1 but for the rounding of lse: with large scores that is much.
    const Vec mean = if_less(zero(), total, delta / total, zero());
    delta = whole ? mean - load(buffers.dlse + i) : load(buffers.delta + i);
    for (int64_t j = 0; j < columns; ++j) {
      const int64_t at = j * kRows + i;
      const Vec weight = load(buffers.weights + at);
      Vec dscore = weight * (load(buffers.dscores + at) - delta) * scale;
      if (capped) dscore = dscore * load(buffers.slope + at);
      store(buffers.dscores + at, dscore);
      if (dropout) store(buffers.weights + at, weight * load(buffers.keep + at));
    }
  }
}

// One block of rows: writes its dq, adds to dk and dv (columns x padded(D) floats) of the head. `next`: the block that
// follows.
template <class Math>
void differentiate_block(const AttentionInputs& p, const AttentionGradients& g, const RowBlock& block,
                         const Lanes& lanes, const Lanes& next, int64_t kv_head, const BackwardBuffers& buffers,
                         float* dk, float* dv) {
  const int64_t stride = padded(p.width), rows = lanes.count;
  const auto q = Math::lanes(p.q, p.type, p.q_strides, lanes, p.width, buffers.q);
  const auto q_turned = Math::turned(q, lanes, p.width, p.scale, buffers.q_turned);
  const auto q_deep = Math::deep(q, rows, p.width, buffers.q_deep);
  const auto dout = Math::lanes(g.dout, p.type, g.dout_strides, lanes, p.width, buffers.dout);
  const auto dout_turned = Math::turned(dout, lanes, p.width, 1.0f, buffers.dout_turned);
  const auto dout_deep = Math::deep(dout, rows, p.width, buffers.dout_deep);
  read_statistics(p, g, lanes, buffers);
  std::fill(buffers.dq, buffers.dq + rows * stride, 0.0f);
  const Strides out_strides{p.rows * p.heads * p.width, p.heads * p.width, p.width};
  const Fetcher next_q(p.q, p.type, p.q_strides, lanes.batch, 0, p.width);
  const Fetcher next_dout(g.dout == nullptr ? g.out : g.dout, p.type, g.dout_strides, lanes.batch, 0, p.width);
  const Fetcher next_out(g.out, p.type, out_strides, lanes.batch, 0, p.width);
  const Fetcher next_k(p.k, p.type, p.k_strides, lanes.batch, kv_head, p.width);
  const Fetcher next_v(p.v, p.type, p.v_strides, lanes.batch, kv_head, p.width);
  for (int64_t j0 = block.first_column; j0 < block.end_column; j0 += kColumns) {
    const int64_t columns = std::min(kColumns, block.end_column - j0);
    const bool partial = !sees_all(p, block, j0, columns);
    const Band rows_seen = band_of_rows(p, block, j0), columns_seen = transposed(rows_seen);
    const auto columns_of = [&](const void* tensor, const Strides& strides, Use use, float* to) {
      return Math::columns(tensor, p.type, strides, lanes.batch, kv_head, j0, columns, p.width, use, to);
    };
    const auto k = columns_of(p.k, p.k_strides, Use::often, buffers.k);
    const auto v = columns_of(p.v, p.v_strides, Use::once, buffers.v);
    // Where nothing is visible the product may leave the scores as they are, and the soft cap takes its slope of them.
    if (partial && p.softcap > 0.0f) std::fill(buffers.weights, buffers.weights + columns * kRows, 0.0f);
    product<Layout::rows>(columns, lanes.padded, p.width, k.data, k.stride, q_turned.data, q_turned.stride,
                          buffers.weights, kRows, false, columns_seen);
    Math::scale(columns, lanes.padded, p.scale, buffers.weights);
    finish_scores(p, lanes, j0, columns, partial, buffers.weights, buffers.slope);
    // And dp: zero, since 0 * NaN would be NaN
    if (partial) std::fill(buffers.dscores, buffers.dscores + columns * kRows, 0.0f);
    product<Layout::rows>(columns, lanes.padded, p.width, v.data, v.stride, dout_turned.data, dout_turned.stride,
                          buffers.dscores, kRows, false, columns_seen);
    if (p.rng_state != nullptr) dropout_factors(p, lanes, j0, columns, buffers.keep);
    const auto fetch = [&](int64_t j) __attribute__((always_inline)) {  // see prefetch()
      const int64_t column = j0 + kColumns + j;
      if (column < p.columns) next_k.fetch(column), next_v.fetch(column);
      if (j0 + kColumns < block.end_column || j >= next.count) return;
      for (const Fetcher* rows : {&next_q, &next_dout, &next_out}) rows->fetch(next.row[j], next.head[j]);
    };
    differentiate(p, columns, lanes.padded, columns == block.end_column - block.first_column, buffers, fetch);
    const auto weights = Math::rounded(columns, lanes, buffers.weights, buffers.weights_rounded);
    product<Layout::rows>(columns, stride, rows, weights.data, weights.stride, dout_deep.data, dout_deep.stride,
                          dv + j0 * stride, stride, true, {}, columns_seen);
    const auto dscores = Math::rounded(columns, lanes, buffers.dscores, buffers.dscores_rounded);
    product<Layout::rows>(columns, stride, rows, dscores.data, dscores.stride, q_deep.data, q_deep.stride,
                          dk + j0 * stride, stride, true, {}, columns_seen);
    const auto dscores_deep = Math::deep(dscores, columns, lanes.padded, buffers.dscores_deep);
    const auto k_deep = Math::deep(k, columns, p.width, buffers.k);
    product<Layout::columns>(rows, stride, columns, dscores_deep.data, dscores_deep.stride, k_deep.data, k_deep.stride,
                             buffers.dq, stride, true, {}, rows_seen);
  }
  for (int64_t i = 0; i < rows; ++i) {
    write_row(buffers.dq + i * stride, 1.0f, p.width, g.dq, p.type,
              (lanes.batch * p.rows + lanes.row[i]) * g.dq_row + lanes.head[i] * p.width);
  }
}

// The rows begin .. end-1 of dk or dv of a head of a batch entry. to_row: elements from one to the next.
void write_head(const AttentionInputs& p, int64_t place, int64_t begin, int64_t end, const float* from, void* to,
                int64_t to_row) {
  const int64_t batch = place / p.kv_heads, kv_head = place % p.kv_heads, stride = padded(p.width);
  for (int64_t j = begin; j < end; ++j) {
    write_row(from + j * stride, 1.0f, p.width, to, p.type, (batch * p.columns + j) * to_row + kv_head * p.width);
  }
}

template <class Math>
void attention_backward(const AttentionInputs& p, const AttentionGradients& g) {
  const int64_t stride = padded(p.width);
  const std::vector<RowBlock> blocks = row_blocks(p);
  const int64_t count = static_cast<int64_t>(blocks.size()), places = p.batch * p.kv_heads;
  if (places == 0) return;
  const int64_t sums = 2 * p.columns * stride;  // floats: dk and dv of a head
  const int64_t affordable = kMostSharedFloats / std::max<int64_t>(1, places * sums);
  const int64_t parts = std::clamp<int64_t>(std::min({kWantedTasks / places, count, affordable}), 1, kWantedTasks);

  const int64_t buffers = BackwardBuffers::floats(stride);
  const int64_t work = 5 * places * scores_of(blocks) * stride;
  const auto run = [&](int64_t place, int64_t part, float* buffer, float* dk, float* dv) {
    std::memset(dk, 0, p.columns * stride * sizeof(float));
    std::memset(dv, 0, p.columns * stride * sizeof(float));
    const int64_t batch = place / p.kv_heads, kv_head = place % p.kv_heads;
    Lanes lanes, next;
    if (part < count) set_lanes(p, blocks[part], batch, kv_head, next);
    for (int64_t b = part; b < count; b += parts) {
      lanes = next;
      if (b + parts < count) set_lanes(p, blocks[b + parts], batch, kv_head, next);
      differentiate_block<Math>(p, g, blocks[b], lanes, next, kv_head, BackwardBuffers(buffer, stride), dk, dv);
    }
  };
  if (parts == 1) {
    for_each_task(places, work, buffers + sums, [&](int64_t place, float* buffer) {
      float *dk = buffer + buffers, *dv = dk + p.columns * stride;
      run(place, 0, buffer, dk, dv);
      write_head(p, place, 0, p.columns, dk, g.dk, g.dkv_row);
      write_head(p, place, 0, p.columns, dv, g.dv, g.dkv_row);
    });
    return;
  }
  const std::unique_ptr<float[]> shared(new float[places * parts * sums]);
  for_each_task(places * parts, work, buffers, [&](int64_t task, float* buffer) {
    float *dk = shared.get() + task * sums, *dv = dk + p.columns * stride;
    run(task / parts, task % parts, buffer, dk, dv);
  });
  const int64_t slices = ceil_divide(p.columns, kColumns);
  for_each_task(places * slices, places * parts * sums, 0, [&](int64_t task, float*) {
    const int64_t place = task / slices, begin = task % slices * kColumns, end = std::min(p.columns, begin + kColumns);
    for (int64_t half = 0; half < 2; ++half) {  // dk, dv
      float* total = shared.get() + place * parts * sums + half * p.columns * stride;
      for (int64_t part = 1; part < parts; ++part) {
        for (int64_t d = begin * stride; d < end * stride; d += Vec::size) {
          store(total + d, load(total + d) + load(total + part * sums + d));
        }
      }
      write_head(p, place, begin, end, total, half == 0 ? g.dk : g.dv, g.dkv_row);
    }
  });
}

}  // namespace

void attention_backward_cpu(const AttentionInputs& p, const AttentionGradients& g) {
#if defined(FASTLM_PAIRS_OF_BF16)
  if (Pairs::take(p)) return attention_backward<Pairs>(p, g);
#endif
  attention_backward<Floats>(p, g);
}

}  // namespace fastlm::FASTLM_ISA

FASTLM_DISPATCH_BF16(attention_backward_cpu, (const AttentionInputs& p, const AttentionGradients& g), (p, g))
