// rotary.h on the CPU: one pass, shared out by tokens.
#include "rotary/rotary.h"

#include <stdexcept>
#include <string>

#include "common/parallel.h"
#include "common/rows.h"
#include "common/simd.h"

namespace fastlm::FASTLM_ISA {
namespace {

int64_t position_of(const Rotary& p, int64_t b, int64_t t) {
  if (p.positions == nullptr) return t;
  const int64_t i = b * p.positions_batch + t;
  return p.wide_positions ? static_cast<const int64_t*>(p.positions)[i] : static_cast<const int32_t*>(p.positions)[i];
}

void check_positions(const Rotary& p) {
  if (p.positions == nullptr) return;
  for (int64_t b = 0; b < (p.positions_batch == 0 ? 1 : p.batch); ++b) {
    for (int64_t t = 0; t < p.rows; ++t) {
      const int64_t position = position_of(p, b, t);
      if (position >= 0 && position < p.table_rows) continue;
      throw std::invalid_argument("rotary: position " + std::to_string(position) + " of token " + std::to_string(t) +
                                  " is not a row of the tables, which have " + std::to_string(p.table_rows));
    }
  }
}

template <class T>
void turn_halves(const T* x, T* y, const float* cos, const float* sin, Vec sign, int64_t pairs) {
  over_row(pairs, [&](auto at, int64_t i, int) {
    const Vec a = at.load(x + i), b = at.load(x + pairs + i), c = at.load(cos + i), s = sign * at.load(sin + i);
    at.store(y + i, fma(a, c, zero() - b * s));
    at.store(y + pairs + i, fma(b, c, a * s));
  });
}

// Pairs lie side by side: through a small buffer of floats, in whose loop the compiler finds the shuffles.
template <class T>
void turn_interleaved(const T* x, T* y, const float* cos, const float* sin, float sign, int64_t pairs) {
  constexpr int64_t kPairs = 32;
  float in[2 * kPairs], out[2 * kPairs];
  for (int64_t first = 0; first < pairs; first += kPairs) {
    const int64_t n = std::min(kPairs, pairs - first);
    over_row(2 * n, [&](auto at, int64_t i, int) { at.store(in + i, at.load(x + 2 * first + i)); });
    for (int64_t i = 0; i < n; ++i) {
      const float a = in[2 * i], b = in[2 * i + 1], c = cos[first + i], s = sign * sin[first + i];
      out[2 * i] = a * c - b * s;
      out[2 * i + 1] = b * c + a * s;
    }
    over_row(2 * n, [&](auto at, int64_t i, int) { at.store(y + 2 * first + i, at.load(out + i)); });
  }
}

template <class T>
void turn_token(const Rotary& p, const RotaryTensor& tensor, int64_t b, int64_t t, const float* cos, const float* sin) {
  const float sign = p.inverse ? -1.0f : 1.0f;
  const int64_t turned = 2 * p.pairs;
  for (int64_t h = 0; h < tensor.heads; ++h) {
    const T* x = static_cast<const T*>(tensor.x) + b * tensor.x_batch + t * tensor.x_row + h * tensor.x_head;
    T* y = static_cast<T*>(tensor.y) + b * tensor.y_batch + t * tensor.y_row + h * tensor.y_head;
    for (int64_t i = 0; i < p.width; i += kLine / sizeof(T)) {
      if (x != y) fetch_ahead(x + i);
      fetch_ahead_to_write(y + i);
    }
    if (p.interleaved) {
      turn_interleaved(x, y, cos, sin, sign, p.pairs);
    } else {
      turn_halves(x, y, cos, sin, set1(sign), p.pairs);
    }
    if (x != y) std::copy(x + turned, x + p.width, y + turned);
  }
}

}  // namespace

void rotary_cpu(const Rotary& p) {
  check_positions(p);
  const int64_t heads = (p.tensors[0].x == nullptr ? 0 : p.tensors[0].heads) +
                        (p.tensors[1].x == nullptr ? 0 : p.tensors[1].heads);
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, heads * p.width));
  with_type(p.type, [&](auto type) {
    parallel_for(p.batch * p.rows, grain, [&](int64_t begin, int64_t end) {
      for (int64_t token = begin; token < end; ++token) {
        const int64_t b = token / p.rows, t = token % p.rows;
        const int64_t offset = position_of(p, b, t) * p.pairs + (p.positions == nullptr ? b * p.table_batch : 0);
        for (const RotaryTensor& tensor : p.tensors) {
          if (tensor.x != nullptr) turn_token<decltype(type)>(p, tensor, b, t, p.cos + offset, p.sin + offset);
        }
      }
    });
  });
}

}  // namespace fastlm::FASTLM_ISA

FASTLM_DISPATCH(rotary_cpu, (const Rotary& p), (p))
