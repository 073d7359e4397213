// sample.h on the CPU: a thread takes whole rows.
#include "sampling/sample.h"

#include <cmath>
#include <limits>
#include <memory>

#include "common/parallel.h"
#include "common/rows.h"
#include "common/simd.h"
#include "common/simd_math.h"

namespace fastlm::FASTLM_ISA {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Unsigned integers in the order of the floats.
uint32_t key_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

struct Threshold {
  uint32_t key;   // the largest at which the weights of keys >= it sum to `target` or more
  int64_t above;  // the sum over the keys greater than it
};

// Radix selection, a byte at a time from the top: a histogram of the weights of those that agree in the bytes so far.
template <class Weight>
Threshold select(const float* x, int64_t n, int64_t target, const Weight& weight) {
  Threshold found{0, 0};
  uint32_t decided = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    int64_t histogram[256] = {};
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t key = key_of(x[i]);
      if (((key ^ found.key) & decided) == 0) histogram[(key >> shift) & 255] += weight(i);
    }
    uint32_t digit = 255;
    while (digit > 0 && found.above + histogram[digit] < target) found.above += histogram[digit--];
    found.key |= digit << shift;
    decided |= 255u << shift;
  }
  return found;
}

uint64_t random_bits(const Sample& p, int64_t row) {
  const int64_t* state = p.rng_state + (p.state_a_row ? 2 * row : 0);
  const uint64_t seed = static_cast<uint64_t>(state[0]);
  uint32_t c[4] = {p.state_a_row ? 0 : static_cast<uint32_t>(row), 0, 0, static_cast<uint32_t>(state[1])};
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    const uint64_t even = uint64_t{0xD2511F53u} * c[0], odd = uint64_t{0xCD9E8D57u} * c[2];
    const uint32_t c1 = c[1], c3 = c[3];
    c[0] = static_cast<uint32_t>(odd >> 32) ^ c1 ^ k0;
    c[1] = static_cast<uint32_t>(odd);
    c[2] = static_cast<uint32_t>(even >> 32) ^ c3 ^ k1;
    c[3] = static_cast<uint32_t>(even);
  }
  return uint64_t{c[1]} << 32 | c[0];
}

// x = logits / temperature. Returns the largest; NaN where there is a NaN.
template <class T>
float scale(const T* logits, int64_t n, float temperature, float* x) {
  Vec largest[kSums], nan[kSums];
  for (int k = 0; k < kSums; ++k) largest[k] = set1(-kInfinity), nan[k] = zero();
  over_row(n, [&](auto at, int64_t i, int k) {
    const Vec v = at.load(logits + i) / set1(temperature) + zero();  // -0 becomes 0: they are equal
    at.store(x + i, v);
    nan[k] += at.keep((v - v) * zero());  // NaN for a NaN, but for an infinity too
    largest[k] = max(at.keep(v, set1(-kInfinity)), largest[k]);
  });
  float lanes[Vec::size];
  store(lanes, max(max(largest[0], largest[1]), max(largest[2], largest[3])));
  const float maximum = *std::max_element(lanes, lanes + Vec::size);
  if (total(nan) == 0.0f) return maximum;
  for (int64_t i = 0; i < n; ++i) {  // an infinity or a NaN
    if (x[i] != x[i]) return x[i];
  }
  return maximum;
}

int64_t draw(const Sample& p, int64_t row, int64_t n, float maximum, float* x, int64_t* w) {
  constexpr int64_t kBlock = 256;
  float e[kBlock];
  for (int64_t first = 0; first < n; first += kBlock) {
    const int64_t count = std::min(kBlock, n - first);
    over_row(count, [&](auto at, int64_t i, int) { at.store(e + i, exp(at.load(x + first + i) - set1(maximum))); });
    for (int64_t i = 0; i < count; ++i) w[first + i] = static_cast<int64_t>(e[i] * kSampleOne);
  }
  if (p.top_k > 0 && p.top_k < n) {
    const uint32_t kth = select(x, n, p.top_k, [](int64_t) { return int64_t{1}; }).key;
    for (int64_t i = 0; i < n; ++i) w[i] = key_of(x[i]) < kth ? 0 : w[i];
  }
  if (p.top_p < 1.0) {
    int64_t all = 0;
    for (int64_t i = 0; i < n; ++i) all += w[i];
    const int64_t wanted = std::max<int64_t>(1, static_cast<int64_t>(std::ceil(p.top_p * static_cast<double>(all))));
    const Threshold last = select(x, n, wanted, [&](int64_t i) { return w[i]; });
    int64_t sum = last.above;  // the tokens at the threshold count in the order of their places
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t key = key_of(x[i]);
      if (key > last.key) continue;
      if (key < last.key || sum >= wanted) w[i] = 0;
      else sum += w[i];
    }
  }
  const float least = maximum + p.log_min_p;
  int64_t all = 0;
  for (int64_t i = 0; i < n; ++i) {
    w[i] = x[i] < least ? 0 : w[i];
    all += w[i];
  }
  int64_t left = static_cast<int64_t>(static_cast<unsigned __int128>(random_bits(p, row)) * static_cast<uint64_t>(all) >> 64);
  int64_t i = 0;
  while (left >= w[i]) left -= w[i++];
  return i;
}

}  // namespace

void sample_cpu(const Sample& p) {
  const int64_t n = p.vocabulary;
  with_type(p.type, [&](auto type) {
    parallel_for(p.rows, std::max<int64_t>(1, kGrain / n), [&](int64_t begin, int64_t end) {
      const bool greedy = p.temperature == 0.0f;
      const std::unique_ptr<float[]> x(new float[n]);
      const std::unique_ptr<int64_t[]> w(new int64_t[greedy ? 0 : n]);
      for (int64_t row = begin; row < end; ++row) {
        const auto* logits = static_cast<const decltype(type)*>(p.logits) + row * p.stride;
        const float maximum = scale(logits, n, greedy ? 1.0f : p.temperature, x.get());
        if (!(std::abs(maximum) < kInfinity)) {
          p.ids[row] = -1;
        } else if (greedy) {
          p.ids[row] = std::find(x.get(), x.get() + n, maximum) - x.get();
        } else {
          p.ids[row] = draw(p, row, n, maximum, x.get(), w.get());
        }
      }
    });
  });
}

}  // namespace fastlm::FASTLM_ISA

FASTLM_DISPATCH(sample_cpu, (const Sample& p), (p))
