// Attention of new tokens over a cache on small cases, for the sanitizers. A plain loop gives the wanted values.
#include <cstdio>

#include "decode_attention/append.h"
#include "decode_attention/decode_attention.h"
#include "sanitize_values.h"

namespace {

using namespace fastlm;

struct Case {
  DType type;
  int64_t rows, heads, kv_heads, width;
  std::vector<int32_t> lengths;  // a sequence each
  int64_t capacity, page;        // page 0: no table
  int64_t window;
  bool alibi;
  float softcap;
  int shift;  // bytes, of the address of every tensor
};

// The sequence's column j as a row of the cache; -1 where the table has no such page.
int64_t row_of(const DecodeAttention& p, int64_t b, int64_t j) {
  if (p.table == nullptr) return b * p.capacity + j;
  const int64_t page = p.table[b * p.table_width + j / p.page];
  return page < 0 || page >= p.pages ? -1 : page * p.page + j % p.page;
}

// out[b, t, head], computed in float64.
std::vector<double> attend(const DecodeAttention& p, const Tensor& q, const Tensor& k, const Tensor& v, int64_t b, int64_t t,
                           int64_t head) {
  const int64_t length = std::min<int64_t>(p.lengths[b], p.capacity), i = length - p.rows + t;
  const int64_t kv_head = head / (p.heads / p.kv_heads);
  const int64_t query = ((b * p.rows + t) * p.heads + head) * p.width;
  std::vector<double> out(p.width);
  double all = 0.0;
  for (int64_t j = std::max<int64_t>(0, p.window < 0 ? 0 : i - p.window); j <= i; j++) {
    const int64_t row = row_of(p, b, j);
    if (row < 0) continue;
    const int64_t key = row * p.k_strides[1] + kv_head * p.k_strides[2], value = row * p.v_strides[1] + kv_head * p.v_strides[2];
    double score = 0.0;
    for (int64_t d = 0; d < p.width; d++) score += static_cast<double>(q[query + d]) * k[key + d];
    score *= p.scale;
    if (p.softcap > 0.0f) score = p.softcap * std::tanh(score / p.softcap);
    if (p.alibi_slopes != nullptr) score -= p.alibi_slopes[head] * static_cast<double>(i - j);
    const double weight = std::exp(score);
    all += weight;
    for (int64_t d = 0; d < p.width; d++) out[d] += weight * v[value + d];
  }
  for (double& o : out) o = all == 0.0 ? 0.0 : o / all;
  return out;
}

void run(const Case& c) {
  const int64_t batch = static_cast<int64_t>(c.lengths.size()), gap = 8, row = c.kv_heads * c.width + gap;
  const int64_t table_width = c.page == 0 ? 0 : c.capacity / c.page, pages = batch * table_width;
  const int64_t cache = batch * c.capacity * row - gap;
  Tensor q(batch * c.rows * c.heads * c.width, c.type, 1, c.shift), out(q.numel, c.type, 2, c.shift);
  Tensor k(cache, c.type, 3, c.shift), v(cache, c.type, 4, c.shift);
  const float slopes[] = {0.25f, 0.5f, 0.125f, 0.0625f};
  std::vector<int32_t> table;  // the pages backwards; one of the last sequence's is missing
  for (int64_t i = 0; i < pages; i++) table.push_back(static_cast<int32_t>(i == pages - table_width ? -1 : pages - 1 - i));
  Buffer workspace(4 * decode_attention_workspace(batch, c.rows, c.heads, c.width, c.capacity));
  const int64_t entry = (c.page == 0 ? c.capacity : c.page) * row;
  DecodeAttention p{};
  p.q = q.data, p.k = k.data, p.v = v.data, p.out = out.data, p.workspace = workspace.floats();
  const int64_t strides[] = {entry, row, c.width};
  std::copy(strides, strides + 3, p.k_strides);
  std::copy(strides, strides + 3, p.v_strides);
  p.lengths = c.lengths.data();
  p.table = c.page == 0 ? nullptr : table.data();
  p.alibi_slopes = c.alibi ? slopes : nullptr;
  p.batch = batch, p.rows = c.rows, p.heads = c.heads, p.kv_heads = c.kv_heads, p.width = c.width;
  p.capacity = c.capacity, p.pages = pages, p.page = c.page, p.table_width = table_width;
  p.window = c.window, p.scale = 0.125f, p.softcap = c.softcap, p.type = c.type;
  decode_attention_cuda(p, nullptr);
  std::vector<double> wanted;
  for (int64_t i = 0; i < batch * c.rows * c.heads; i++) {
    const auto one = attend(p, q, k, v, i / c.heads / c.rows, i / c.heads % c.rows, i % c.heads);
    wanted.insert(wanted.end(), one.begin(), one.end());
  }
  compare("decode_attention", out, wanted);
}

// Into row 0 and the last one of two sequences; every other element of the caches stays.
void append(DType type, int64_t cols, int shift) {
  const int64_t capacity = 3, gap = 8, row = cols + gap;
  Tensor k_cache(2 * capacity * row, type, 1, shift), v_cache(2 * capacity * row, type, 2, shift);
  Tensor k(2 * row, type, 3, shift), v(2 * row, type, 4, shift);
  const int64_t at[] = {0, capacity - 1};
  std::vector<double> wanted[] = {k_cache.values(), v_cache.values()};
  for (int64_t i = 0; i < 2 * cols; i++) {
    const int64_t to = (i / cols * capacity + at[i / cols]) * row + i % cols, from = i / cols * row + i % cols;
    wanted[0][to] = k[from], wanted[1][to] = v[from];
  }
  cache_append_cuda({k_cache.data, v_cache.data, k.data, v.data, at, {capacity * row, row}, {capacity * row, row}, row, row, 2, capacity,
                     cols, type}, nullptr);
  compare("cache_append, keys", k_cache, wanted[0]);
  compare("cache_append, values", v_cache, wanted[1]);
}

}  // namespace

// With an argument also the cases with many threads: under ThreadSanitizer each costs a fiber, and those are slow to make.
int main(int arguments, char**) {
  const DType f32 = DType::f32, f16 = DType::f16, bf16 = DType::bf16;
  try {
    run({bf16, 1, 2, 1, 40, {150}, 200, 0, -1, false, 0.0f, 0});
    append(bf16, 80, 0);
    append(f32, 7, 4);
    run({f32, 2, 1, 1, 7, {1, 33}, 36, 12, -1, true, 0.0f, 0});
    if (arguments > 1) {
      run({f16, 3, 4, 2, 24, {0, 290, 17}, 300, 0, 130, true, 2.0f, 0});
      run({bf16, 2, 4, 1, 256, {1, 48}, 48, 16, -1, false, 3.0f, 0});
      run({f32, 1, 3, 1, 64, {260, 500}, 260, 0, 5, false, 0.0f, 4});
      run({f16, 5, 1, 1, 1, {129}, 129, 0, -1, false, 0.0f, 2});
    }
  } catch (const std::exception& e) {
    std::printf("%s\n", e.what());
    return 3;
  }
  return 0;
}
