// The page of simd.h that this program is compiled for, against plain C++: conversions to the bit, the functions of
// simd_math.h within their bounds, and the operations on lanes.
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

#include "cases.h"
#include "common/simd.h"
#include "common/simd_math.h"
#include "common/transpose.h"
#include "sanitize_values.h"

namespace {

using namespace fastlm;
using namespace fastlm::FASTLM_ISA;

constexpr float kInfinity = std::numeric_limits<float>::infinity(), kNan = std::numeric_limits<float>::quiet_NaN();

void expect(bool right, const std::string& what) {
  if (!right) throw std::runtime_error(what);
}

float lane(Vec a, int64_t i) {
  float lanes[Vec::size];
  store(lanes, a);
  return lanes[i];
}

bool same(float a, float b) { return std::memcmp(&a, &b, 4) == 0 || (std::isnan(a) && std::isnan(b)); }

template <class Half>
uint16_t rounded(float x) {
  Half h[Vec::size];
  store(h, set1(x));
  return h[Vec::size - 1].bits;
}

// `overflow`: where rounding takes a number half-way to, beyond the largest one.
template <class Half>
void convert(DType type, uint16_t infinity, double overflow) {
  const std::string name = type == DType::f16 ? "f16 " : "bf16 ";
  const auto value = [&](uint16_t bits) {
    Tensor one(1, type);
    std::memcpy(one.data, &bits, 2);
    return one[0];
  };
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const Half h{static_cast<uint16_t>(bits)};
    expect(same(lane(load_n(&h, 1), 0), value(h.bits)), name + "from bits " + std::to_string(bits));
  }
  for (uint16_t bits = 0; bits < infinity; ++bits) {
    const std::string at = name + "to bits " + std::to_string(bits);
    const uint16_t next = static_cast<uint16_t>(bits + 1);
    const double above = next == infinity ? overflow : value(next);
    const float middle = static_cast<float>((value(bits) + above) / 2);  // exact
    expect(rounded<Half>(value(bits)) == bits, at);
    expect(rounded<Half>(-middle) == ((bits % 2 == 0 ? bits : next) | 0x8000), at + ", a tie");
    expect(rounded<Half>(std::nextafterf(middle, 0.0f)) == bits, at + ", below the tie");
    expect(rounded<Half>(std::nextafterf(middle, kInfinity)) == next, at + ", above the tie");
  }
  expect(rounded<Half>(-kInfinity) == (infinity | 0x8000), name + "infinity");
  expect((rounded<Half>(kNan) & 0x7fff) > infinity, name + "NaN");
}

// The largest error in units in the last place of the exact value, which must be at most `bound`.
template <class Function, class Exact>
void bounded(const char* name, double bound, float low, const Function& f, const Exact& exact) {
  for (uint32_t bits = 0; bits < 0x7f800000; bits += 50021) {
    float x;
    std::memcpy(&x, &bits, 4);
    for (const float signed_x : {x, -x}) {
      if (signed_x < low) continue;
      const double wanted = exact(signed_x);
      const float got = lane(f(set1(signed_x)), Vec::size - 1);
      if (same(got, static_cast<float>(wanted))) continue;
      int exponent;
      std::frexp(std::max(std::abs(wanted), 0x1p-126), &exponent);
      expect(std::abs(got - wanted) <= bound * std::ldexp(1.0, exponent - 24),
             std::string(name) + "(" + std::to_string(signed_x) + ") is " + std::to_string(got));
    }
  }
}

void lanes() {
  constexpr int64_t n = Vec::size;
  Tensor a(n, DType::f32, 1), b(n, DType::f32, 2), square(n * n, DType::f32, 3), y(n, DType::f32);
  const Vec va = load(a.floats()), vb = load(b.floats());
  float total = 0.0f;
  for (int64_t i = 0; i < n; ++i) {
    total += a[i];  // exact: multiples of 1/8
    expect(lane(max(va, vb), i) == std::max(a[i], b[i]) && lane(min(va, vb), i) == std::min(a[i], b[i]), "max, min");
    expect(lane(if_less(va, vb, va, zero()), i) == (a[i] < b[i] ? a[i] : 0.0f), "if_less");
    expect(lane(fma(va, vb, va), i) == std::fma(a[i], b[i], a[i]), "fma");
    expect(lane(copysign(vb, va), i) == std::copysign(b[i], a[i]) && lane(abs(va), i) == std::abs(a[i]), "copysign, abs");
    expect(lane(sqrt(abs(va)), i) == std::sqrt(std::abs(a[i])), "sqrt");
    expect(lane(va / set1(3.0f), i) == a[i] / 3.0f, "division");
    expect(lane(ldexp(va, set1(-130.0f)), i) == std::ldexp(a[i], -130), "ldexp");
    for (int64_t count = 0; count < n; ++count) {
      expect(lane(first_n(va, vb, count), i) == (i < count ? a[i] : b[i]), "first_n");
      expect(lane(load_n(a.floats(), count), i) == (i < count ? a[i] : 0.0f), "load_n");
      store(y.floats(), vb);
      store_n(y.floats(), va, count);
      expect(y[i] == (i < count ? a[i] : b[i]), "store_n");
    }
  }
  expect(sum(va) == total, "sum");
  expect(lane(max(set1(kNan), va), 0) == a[0] && std::isnan(lane(max(va, set1(kNan)), 0)), "max with NaN");
  expect(lane(min(set1(kNan), va), 0) == a[0] && std::isnan(lane(min(va, set1(kNan)), 0)), "min with NaN");
  Vec rows[Vec::size];
  for (int64_t i = 0; i < n; ++i) rows[i] = load(square.floats() + i * n);
  transpose(rows);
  for (int64_t i = 0; i < n * n; ++i) expect(lane(rows[i / n], i % n) == square[i % n * n + i / n], "transpose");
}

}  // namespace

void conversions() {
  convert<f16>(DType::f16, 0x7c00, 0x1p16);
  convert<bf16>(DType::bf16, 0x7f80, 0x1p128);
}

void vector_functions() {
  bounded("exp", 1.0, -kInfinity, [](Vec x) { return exp(x); }, [](double x) { return std::exp(x); });
  bounded("tanh", 2.0, -kInfinity, [](Vec x) { return tanh(x); }, [](double x) { return std::tanh(x); });
  bounded("logistic", 3.0, -87.0f, [](Vec x) { return logistic(x); }, [](double x) { return 1.0 / (1.0 + std::exp(-x)); });
  bounded("normal cdf", 17.0, -5.0f, [](Vec x) { return normal(x).cdf; },  // 1e-6 of itself
          [](double x) { return 0.5 * std::erfc(-x * 0.70710678118654752); });
  lanes();
}
