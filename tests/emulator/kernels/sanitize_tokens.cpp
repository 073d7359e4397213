// Rotary positions, the embedding and sampling on small cases, for the sanitizers. A plain loop gives the wanted values.
#include <algorithm>
#include <cstdio>
#include <limits>
#include <memory>

#include "embedding/embedding.h"
#include "rotary/rotary.h"
#include "sampling/sample.h"
#include "sanitize_values.h"

namespace {

using namespace fastlm;

enum class Positions { none, narrow, wide };

void rotary(DType type, int64_t width, int64_t pairs, bool interleaved, bool inverse, Positions positions, bool in_place) {
  const int64_t batch = 2, rows = 3, heads[] = {3, 1}, table_rows = 5, gap = 8;
  const int64_t wide[] = {0, 4, 2, 1, -1, 3};  // -1 is no row of the tables
  int32_t narrow[6];
  std::copy(wide, wide + 6, narrow);
  Tensor cos(table_rows * pairs, DType::f32, 1), sin(table_rows * pairs, DType::f32, 2);
  Rotary p{};
  std::unique_ptr<Tensor> x[2], y[2];
  std::vector<double> wanted[2];
  for (int i = 0; i < 2; i++) {
    const int64_t row = heads[i] * width + gap, numel = batch * rows * row - gap;
    x[i] = std::make_unique<Tensor>(numel, type, 3 + i);
    y[i] = std::make_unique<Tensor>(numel, type, 5 + i);
    const Tensor& to = in_place ? *x[i] : *y[i];
    p.tensors[i] = {x[i]->data, to.data, rows * row, row, width, rows * row, row, width, heads[i]};
    wanted[i] = to.values();
    for (int64_t head = 0; head < batch * rows * heads[i]; head++) {
      const int64_t token = head / heads[i], at = token * row + head % heads[i] * width;
      const int64_t position = positions == Positions::none ? token % rows : wide[token];
      for (int64_t d = 2 * pairs; d < width; d++) wanted[i][at + d] = (*x[i])[at + d];
      for (int64_t pair = 0; pair < pairs; pair++) {
        const int64_t first = at + (interleaved ? 2 * pair : pair), second = interleaved ? first + 1 : first + pairs;
        const double a = (*x[i])[first], b = (*x[i])[second];
        const double c = position < 0 ? NAN : cos[position * pairs + pair];
        const double s = position < 0 ? NAN : (inverse ? -1 : 1) * sin[position * pairs + pair];
        wanted[i][first] = a * c - b * s;
        wanted[i][second] = b * c + a * s;
      }
    }
  }
  p.cos = cos.floats(), p.sin = sin.floats(), p.table_rows = table_rows;
  p.wide_positions = positions == Positions::wide;
  p.positions = positions == Positions::none ? nullptr : p.wide_positions ? static_cast<const void*>(wide) : narrow;
  p.positions_batch = rows;
  p.batch = batch, p.rows = rows, p.width = width, p.pairs = pairs;
  p.interleaved = interleaved, p.inverse = inverse, p.type = type;
  rotary_cuda(p, nullptr);
  for (int i = 0; i < 2; i++) compare("rotary", in_place ? *x[i] : *y[i], wanted[i]);
}

void embedding_forward(DType type, int64_t cols, int64_t gap, bool wide_ids) {
  const int64_t vocabulary = 6, stride = cols + gap, wide[] = {5, 0, -1, 6, 2};
  int32_t narrow[5];
  std::copy(wide, wide + 5, narrow);
  Tensor weight(vocabulary * stride - gap, type, 1), y(5 * cols, type, 2);
  std::vector<double> wanted;
  for (const int64_t id : wide) {
    for (int64_t c = 0; c < cols; c++) wanted.push_back(id < 0 || id >= vocabulary ? NAN : weight[id * stride + c]);
  }
  const void* ids = wide_ids ? static_cast<const void*>(wide) : narrow;
  embedding_forward_cuda({ids, wide_ids, weight.data, y.data, 5, vocabulary, cols, stride, type}, nullptr);
  compare("embedding_forward", y, wanted);
}

// 70 places are three tiles: one id lies in all of them, others in one; two are out of range, one is the padding.
void embedding_backward(DType type, int64_t cols, int64_t gap) {
  const int64_t count = 70, vocabulary = 6, stride = cols + gap, padding = 3;
  Tensor dy(count * stride - gap, type, 1), dweight(vocabulary * cols, type);
  for (int64_t i = 0; i < dweight.numel; i++) dweight.set(i, 0.0f);
  std::vector<double> wanted = dweight.values();
  std::vector<int64_t> keys, order;
  for (int64_t i = 0; i < count; i++) {
    keys.push_back(i < 2 ? -1 : i < 10 ? 0 : i < 66 ? 2 : i < 68 ? padding : i < 69 ? 5 : vocabulary);
    order.push_back(i * 29 % count);
    if (keys[i] < 0 || keys[i] >= vocabulary || keys[i] == padding) continue;
    for (int64_t c = 0; c < cols; c++) wanted[keys[i] * cols + c] += dy[order[i] * stride + c];
  }
  Buffer workspace(4 * embedding_backward_workspace_cuda(count, cols));
  embedding_backward_cuda({dy.data, keys.data(), order.data(), dweight.data, workspace.floats(), count, vocabulary, cols, stride,
                           padding, type},
                          nullptr);
  compare("embedding_backward", dweight, wanted);
}

// Words 0 and 1 of Philox4x32-10, word 1 on top.
uint64_t random_bits(uint32_t row, int64_t seed, int64_t offset) {
  uint64_t c[4] = {row, 0, 0, static_cast<uint32_t>(offset)};
  uint32_t low = static_cast<uint32_t>(seed), high = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; round++, low += 0x9E3779B9u, high += 0xBB67AE85u) {
    const uint64_t even = 0xD2511F53u * c[0], odd = 0xCD9E8D57u * c[2];
    const uint64_t next[] = {odd >> 32 ^ c[1] ^ low, odd & 0xffffffff, even >> 32 ^ c[3] ^ high, even & 0xffffffff};
    std::copy(next, next + 4, c);
  }
  return c[1] << 32 | c[0];
}

struct Filters {
  float temperature;
  int64_t top_k;
  double top_p;
  float log_min_p;
};

int64_t drawn(std::vector<float> x, const Filters& f, uint64_t random) {
  if (f.temperature == 0.0f) return std::max_element(x.begin(), x.end()) - x.begin();
  for (float& v : x) v /= f.temperature;
  const float maximum = *std::max_element(x.begin(), x.end());
  std::vector<int64_t> descending;
  std::vector<uint64_t> weights;
  for (const float v : x) {
    weights.push_back(static_cast<uint64_t>(std::exp(v - maximum) * kSampleOne));
    descending.push_back(static_cast<int64_t>(descending.size()));
  }
  std::stable_sort(descending.begin(), descending.end(), [&](int64_t a, int64_t b) { return x[a] > x[b]; });
  const float kth = f.top_k == 0 ? -INFINITY : x[descending[f.top_k - 1]];
  uint64_t all = 0, before = 0;
  for (int64_t i : descending) all += weights[i] = x[i] < kth ? 0 : weights[i];
  const double wanted = f.top_p * static_cast<double>(all);
  for (int64_t i : descending) {
    const uint64_t own = weights[i];
    if (static_cast<double>(before) >= wanted || x[i] < maximum + f.log_min_p) weights[i] = 0;
    before += own;
  }
  all = 0;
  for (const uint64_t w : weights) all += w;
  uint64_t left = static_cast<uint64_t>(static_cast<unsigned __int128>(random) * all >> 64);
  int64_t i = 0;
  while (left >= weights[i]) left -= weights[i++];
  return i;
}

// With more than one row, the last one has a NaN.
void sample(DType type, int64_t rows, int64_t vocabulary, const Filters& f, bool state_a_row) {
  const int64_t stride = vocabulary + 3;
  Tensor logits(rows * stride - 3, type, 4);
  if (rows > 1) logits.set((rows - 1) * stride + vocabulary / 2, NAN);
  std::vector<int64_t> ids(rows), state;
  for (int64_t row = 0; row < rows; row++) {
    state.push_back((int64_t{7} << 40) + row);
    state.push_back(5 + row);
  }
  sample_cuda({logits.data, ids.data(), state.data(), rows, vocabulary, stride, state_a_row, f.temperature, f.top_k, f.top_p,
               f.log_min_p, type},
              nullptr);
  for (int64_t row = 0; row < rows; row++) {
    std::vector<float> x;
    for (int64_t i = 0; i < vocabulary; i++) x.push_back(logits[row * stride + i]);
    const uint64_t random = state_a_row ? random_bits(0, state[2 * row], state[2 * row + 1])
                                        : random_bits(static_cast<uint32_t>(row), state[0], state[1]);
    const int64_t wanted = rows > 1 && row + 1 == rows ? -1 : drawn(x, f, random);
    if (ids[row] == wanted) continue;
    throw std::runtime_error("sample: row " + std::to_string(row) + " is " + std::to_string(ids[row]) + ", wanted " +
                             std::to_string(wanted));
  }
}

}  // namespace

// With an argument also the cases with many threads: under ThreadSanitizer each costs a fiber, and those are slow to make.
int main(int arguments, char**) {
  const DType f32 = DType::f32, f16 = DType::f16, bf16 = DType::bf16;
  const float none = -INFINITY;
  try {
    rotary(bf16, 24, 8, true, false, Positions::none, false);
    rotary(f32, 7, 3, false, true, Positions::narrow, true);
    embedding_forward(bf16, 16, 8, true);
    embedding_backward(f32, 11, 2);
    sample(f32, 1, 1500, {0.9f, 1100, 0.8, none}, false);
    if (arguments > 1) {
      rotary(f16, 16, 8, false, false, Positions::wide, false);
      rotary(f16, 9, 4, true, true, Positions::wide, true);
      rotary(bf16, 264, 128, false, true, Positions::narrow, true);
      embedding_forward(f16, 11, 0, false);
      embedding_forward(f32, 1032, 0, false);
      embedding_backward(bf16, 16, 8);
      embedding_backward(f16, 131, 0);
      sample(f32, 2, 37, {0.0f, 0, 1.0, none}, false);
      sample(bf16, 3, 1, {1.0f, 0, 1.0, none}, true);
      sample(f16, 9, 1027, {1.3f, 70, 0.6, -0.2f}, true);
      sample(bf16, 2, 2100, {0.5f, 0, 1.0, -1.0f}, false);
    }
  } catch (const std::exception& e) {
    std::printf("%s\n", e.what());
    return 3;
  }
  return 0;
}
