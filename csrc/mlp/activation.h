// The activations on Vec: value(h) and both(h), the value with the derivative.
#pragma once
#include "common/simd_math.h"
#include "mlp/mlp.h"

namespace fastlm::FASTLM_ISA {

struct ValueSlope {
  Vec value, slope;
};

// 0.5 h (1 + tanh u) = h * logistic(2u), u = sqrt(2 / pi) (h + 0.044715 h^3): no digits are lost where tanh is near -1.
struct GeluTanh {
  static constexpr float c1 = 1.59576912f, c3 = 0.0713548163f;  // 2 sqrt(2 / pi), and 0.044715 times it
  static Vec gate(Vec h) { return logistic(h * fma(h * h, set1(c3), set1(c1))); }
  static Vec value(Vec h) { return h * gate(h); }
  static ValueSlope both(Vec h) {
    const Vec s = gate(h), value = h * s;
    return {value, fma(value * (set1(1.0f) - s), fma(h * h, set1(3.0f * c3), set1(c1)), s)};
  }
};

struct Gelu {
  static Vec value(Vec h) { return h * normal(h).cdf; }
  static ValueSlope both(Vec h) {
    const Normal n = normal(h);
    return {h * n.cdf, fma(h, n.density, n.cdf)};
  }
};

struct Silu {
  static Vec value(Vec h) { return h * logistic(h); }
  static ValueSlope both(Vec h) {
    const Vec s = logistic(h), value = h * s;
    return {value, fma(value, set1(1.0f) - s, s)};
  }
};

struct Relu {
  static Vec value(Vec h) { return max(zero(), h); }
  static ValueSlope both(Vec h) { return {value(h), if_less(zero(), h, set1(1.0f), zero())}; }
};

struct Relu2 {
  static Vec value(Vec h) {
    const Vec positive = max(zero(), h);
    return positive * positive;
  }
  static ValueSlope both(Vec h) {
    const Vec positive = max(zero(), h);
    return {positive * positive, positive + positive};
  }
};

// body(activation), for a gated one with that of its gate.
template <class Body>
inline void with_activation(Activation a, const Body& body) {
  switch (a) {
    case Activation::gelu_tanh: return body(GeluTanh{});
    case Activation::gelu:
    case Activation::geglu: return body(Gelu{});
    case Activation::relu: return body(Relu{});
    case Activation::relu2: return body(Relu2{});
    case Activation::silu:
    case Activation::swiglu: return body(Silu{});
  }
}

}  // namespace fastlm::FASTLM_ISA
