// decode_attention.h on the CPU: a task is a part of a sequence under one head of keys and values, for all query heads that share it,
// so that the cache is read once.
#include "decode_attention/decode_attention.h"

#include <cmath>
#include <stdexcept>
#include <string>

#include "attention/blocks.h"
#include "attention/scores.h"
#include "common/rows.h"

namespace fastlm::FASTLM_ISA {
namespace {

constexpr int64_t kRegisters = 4;  // vectors of the weighted sum that are held at a time: enough to hide a multiply-add

void check_ranges(const DecodeAttention& p) {
  for (int64_t b = 0; b < p.batch; ++b) {
    if (p.lengths[b] < 0 || p.lengths[b] > p.capacity) {
      throw std::invalid_argument("decode_attention: the length of sequence " + std::to_string(b) + " is " +
                                  std::to_string(p.lengths[b]) + "; wanted 0 to " + std::to_string(p.capacity));
    }
    if (p.table == nullptr) continue;
    for (int64_t i = 0; i * p.page < p.lengths[b]; ++i) {
      const int32_t page = p.table[b * p.table_width + i];
      if (page >= 0 && page < p.pages) continue;
      throw std::invalid_argument("decode_attention: page " + std::to_string(i) + " of sequence " + std::to_string(b) +
                                  " is " + std::to_string(page) + "; wanted 0 to " + std::to_string(p.pages - 1));
    }
  }
}

// The columns that at least one row of sequence b sees.
struct Range {
  int64_t first, end;
};
Range visible(const DecodeAttention& p, int64_t b) {
  const int64_t length = p.lengths[b];
  return {p.window < 0 ? 0 : std::max<int64_t>(0, length - p.rows - p.window), length};
}

int64_t offset_of(const DecodeAttention& p, const int64_t (&strides)[3], int64_t b, int64_t j, int64_t head) {
  if (p.table == nullptr) return b * strides[0] + j * strides[1] + head * strides[2];
  const int64_t page = p.table[b * p.table_width + j / p.page];
  return page * strides[0] + j % p.page * strides[1] + head * strides[2];
}

float* partial(const DecodeAttention& p, int64_t b, int64_t part, int64_t head) {
  return p.workspace + ((b * decode_parts(p.capacity) + part) * p.heads + head) * p.rows * (p.width + 2);
}

// The rows of a head lie far apart, so the processor's own prefetcher does not find the next one.
constexpr int64_t kRowsAhead = 8;
template <class T>
[[gnu::always_inline]] inline void fetch_row(const T* rows, const int64_t* offsets, int64_t j, int64_t n, int64_t width) {
  const T* row = rows + offsets[std::min(j + kRowsAhead, n - 1)];
  for (int64_t d = 0; d < width; d += kLine / sizeof(T)) prefetch(row + d);
}

template <class T>
float dot(const float* q, const T* k, int64_t width) {
  Vec sums[kSums] = {zero(), zero(), zero(), zero()};
  over_row(width, [&](auto at, int64_t i, int s) { sums[s] = fma(at.load(q + i), at.load(k + i), sums[s]); });
  return total(sums);
}

// Both as they lie in memory, where the processor multiplies such numbers.
template <class T>
float dot_in_place(const T* q, const T* k, int64_t width) {
  using P = Products<T>;
  Vec total = zero();
  int64_t d = 0;
  for (; d + P::size <= width; d += P::size) total = P::add(P::load(q + d), P::load(k + d), total);
  if (d < width) total = P::add(P::load_n(q + d, width - d), P::load_n(k + d, width - d), total);
  return sum(total);
}

// Scores of the columns first .. end-1 to weights, -inf to 0. Returns the maximum and the sum.
struct Softmax {
  float maximum, sum;
};
Softmax softmax(float* s, int64_t n) {
  float maximum = -kInfinity;
  for (int64_t j = 0; j < n; ++j) maximum = s[j] > maximum || s[j] != s[j] ? s[j] : maximum;
  const float base = maximum == -kInfinity ? 0.0f : maximum;
  Vec sums[kSums] = {zero(), zero(), zero(), zero()};
  over_row(n, [&](auto at, int64_t i, int k) {
    const Vec w = exp_of_score(at.load(s + i) - set1(base));
    at.store(s + i, w);
    sums[k] += at.keep(w);
  });
  return {maximum, total(sums)};
}

// out = sum over j of weight[j] v_j
template <class T>
void weighted_sum(const float* weights, const int64_t* offsets, const T* v, int64_t n, int64_t width, float* out) {
  int64_t d = 0;
  for (; d + kRegisters * Vec::size <= width; d += kRegisters * Vec::size) {
    Vec sums[kRegisters] = {zero(), zero(), zero(), zero()};
    for (int64_t j = 0; j < n; ++j) {
      fetch_row(v + d, offsets, j, n, kRegisters * Vec::size);
      const Vec w = set1(weights[j]);
      const T* row = v + offsets[j] + d;
      for (int64_t i = 0; i < kRegisters; ++i) sums[i] = fma(w, load(row + i * Vec::size), sums[i]);
    }
    for (int64_t i = 0; i < kRegisters; ++i) store(out + d + i * Vec::size, sums[i]);
  }
  const auto rest = [&](auto at, int64_t c) {
    Vec sum = zero();
    for (int64_t j = 0; j < n; ++j) sum = fma(set1(weights[j]), at.load(v + offsets[j] + c), sum);
    at.store(out + c, sum);
  };
  for (; d + Vec::size <= width; d += Vec::size) rest(Whole{}, d);
  if (d < width) rest(Rest{width - d}, d);
}

template <class T>
void work_on(const DecodeAttention& p, int64_t b, int64_t part, int64_t kv_head, float* buffer) {
  const Range range = visible(p, b);
  const int64_t first = std::max(range.first, part * kDecodePart);
  const int64_t n = std::min(range.end, (part + 1) * kDecodePart) - first;
  if (n <= 0) return;
  const int64_t group = p.heads / p.kv_heads, rows = group * p.rows;
  float* q = buffer;                     // width
  float* scores = q + padded(p.width);   // rows x kDecodePart
  int64_t k_offsets[kDecodePart], v_offsets[kDecodePart];
  for (int64_t j = 0; j < n; ++j) {
    k_offsets[j] = offset_of(p, p.k_strides, b, first + j, kv_head);
    v_offsets[j] = offset_of(p, p.v_strides, b, first + j, kv_head);
  }
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t head = kv_head * group + r / p.rows, t = r % p.rows, i = p.lengths[b] - p.rows + t;
    const float slope = p.alibi_slopes == nullptr ? 0.0f : p.alibi_slopes[b * p.alibi_batch_stride + head];
    float* s = scores + r * kDecodePart;
    const int64_t q_offset = ((b * p.rows + t) * p.heads + head) * p.width;
    const T* k = static_cast<const T*>(p.k);
    if constexpr (Products<T>::pairs) {
      const T* row = static_cast<const T*>(p.q) + q_offset;
      for (int64_t j = 0; j < n; ++j) {
        fetch_row(k, k_offsets, j, n, p.width);
        s[j] = dot_in_place(row, k + k_offsets[j], p.width) * p.scale;
      }
    } else {
      read_row(p.q, p.type, q_offset, p.width, q);
      for (int64_t j = 0; j < n; ++j) {
        fetch_row(k, k_offsets, j, n, p.width);
        s[j] = dot(q, k + k_offsets[j], p.width) * p.scale;
      }
    }
    if (p.softcap > 0.0f) {
      over_row(n, [&](auto at, int64_t c, int) {
        at.store(s + c, set1(p.softcap) * tanh(at.load(s + c) * set1(1.0f / p.softcap)));
      });
    }
    for (int64_t j = 0; j < n; ++j) {
      const int64_t column = first + j;
      s[j] -= slope * static_cast<float>(std::abs(i - column));
      if (column > i || (p.window >= 0 && column < i - p.window)) s[j] = -kInfinity;
    }
    float* out = partial(p, b, part, head) + t * (p.width + 2);
    const Softmax result = softmax(s, n);
    out[p.width] = result.maximum;
    out[p.width + 1] = result.sum;
    weighted_sum(s, v_offsets, static_cast<const T*>(p.v), n, p.width, out);
  }
}

// The parts of row t of a head, in their order, to the output.
void combine(const DecodeAttention& p, int64_t b, int64_t head, int64_t t, float* sum) {
  const Range range = visible(p, b);
  const int64_t begin = range.first / kDecodePart, end = decode_parts(range.end), width = p.width;
  float maximum = -kInfinity, all = 0.0f;
  std::fill(sum, sum + padded(width), 0.0f);
  for (int64_t part = begin; part < end; ++part) {
    const float own = partial(p, b, part, head)[t * (width + 2) + width];
    maximum = own > maximum || own != own ? own : maximum;
  }
  for (int64_t part = begin; part < end && maximum != -kInfinity; ++part) {
    const float* from = partial(p, b, part, head) + t * (width + 2);
    const float factor = from[width] == -kInfinity ? 0.0f : std::exp(from[width] - maximum);
    over_row(width, [&](auto at, int64_t i, int) {
      at.store(sum + i, fma(at.load(from + i), set1(factor), at.load(sum + i)));
    });
    all += factor * from[width + 1];
  }
  write_row(sum, maximum == -kInfinity ? 0.0f : 1.0f / all, width, p.out, p.type, ((b * p.rows + t) * p.heads + head) * width);
}

}  // namespace

void decode_attention_cpu(const DecodeAttention& p) {
  check_ranges(p);
  int64_t longest = 0, columns = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    longest = std::max<int64_t>(longest, p.lengths[b]);
    columns += p.lengths[b];
  }
  const int64_t parts = decode_parts(longest), group = p.heads / p.kv_heads;
  const int64_t floats = padded(p.width) + group * p.rows * kDecodePart;
  // Neighbouring tasks are the heads of one part: in memory they lie side by side.
  with_type(p.type, [&](auto type) {
    for_each_task(p.batch * parts * p.kv_heads, 2 * columns * p.heads * p.rows * p.width, floats, [&](int64_t task, float* buffer) {
      work_on<decltype(type)>(p, task / p.kv_heads / parts, task / p.kv_heads % parts, task % p.kv_heads, buffer);
    });
  });
  const int64_t rows = p.batch * p.heads * p.rows;
  for_each_task(rows, rows * parts * p.width, padded(p.width), [&](int64_t task, float* buffer) {
    combine(p, task / (p.heads * p.rows), task / p.rows % p.heads, task % p.rows, buffer);
  });
}

}  // namespace fastlm::FASTLM_ISA

FASTLM_DISPATCH_BF16(decode_attention_cpu, (const DecodeAttention& p), (p))
