// The activations on the GPU: value(h), and both(h), the value with the derivative. activation.h has them for the CPU.
#pragma once
#include "common/cuda/ptx_math.h"
#include "mlp/mlp.h"

namespace fastlm::cuda {

struct ValueSlope {
  float value, slope;
};

// 1 / (1 + 2^x); both approximations are good to two units in the last place.
FASTLM_DEVICE float logistic2(float x) { return ptx::reciprocal_approx(1.0f + ptx::exp2_approx(x)); }

// 1 / (1 + exp(-x))
FASTLM_DEVICE float logistic(float x) { return logistic2(-1.44269504f * x); }

// 0.5 h (1 + tanh u) = h * logistic(2u), u = sqrt(2 / pi) (h + 0.044715 h^3): no digits are lost where tanh is near -1.
struct GeluTanh {
  static constexpr float c1 = 1.59576912f, c3 = 0.0713548163f;    // 2 sqrt(2 / pi), and 0.044715 times it
  static constexpr float e1 = -2.30220820f, e3 = -0.102943240f;  // -log2(e) times these
  FASTLM_DEVICE static float gate(float h) { return logistic2(h * (h * h * e3 + e1)); }
  FASTLM_DEVICE static float value(float h) { return h * gate(h); }
  FASTLM_DEVICE static ValueSlope both(float h) {
    const float s = gate(h), value = h * s;
    return {value, value * (1.0f - s) * (h * h * (3.0f * c3) + c1) + s};
  }
};

// The standard normal distribution, as simd_math.h has it: its polynomial needs the density's exponential and nothing else.
struct Normal {
  float cdf, density;
};

FASTLM_DEVICE Normal normal(float x) {
  const float a = fabsf(x), e = ptx::exp2_approx(-0.721347520f * (x * x)), t = ptx::reciprocal_approx(a * 0.3f + 1.0f);
  float p = t * 0.0383782955f - 0.169166142f;
  p = p * t + 0.228660145f;
  p = p * t - 0.0765065519f;
  p = p * t + 0.142535576f;
  p = p * t + 0.0946835012f;
  p = p * t + 0.121920348f;
  p = p * t + 0.119487688f;
  p = p * t + 7.16891754e-6f;
  const float tail = e * p;
  return {x > 0.0f ? 1.0f - tail : tail, 0.398942280f * e};
}

struct Gelu {
  FASTLM_DEVICE static float value(float h) { return h * normal(h).cdf; }
  FASTLM_DEVICE static ValueSlope both(float h) {
    const Normal n = normal(h);
    return {h * n.cdf, h * n.density + n.cdf};
  }
};

struct Silu {
  FASTLM_DEVICE static float value(float h) { return h * logistic(h); }
  FASTLM_DEVICE static ValueSlope both(float h) {
    const float s = logistic(h), value = h * s;
    return {value, value * (1.0f - s) + s};
  }
};

struct Relu {
  FASTLM_DEVICE static float value(float h) { return h < 0.0f ? 0.0f : h; }  // NaN stays NaN
  FASTLM_DEVICE static ValueSlope both(float h) { return {value(h), h > 0.0f ? 1.0f : 0.0f}; }
};

struct Relu2 {
  FASTLM_DEVICE static float value(float h) { return Relu::value(h) * Relu::value(h); }
  FASTLM_DEVICE static ValueSlope both(float h) { return {value(h), 2.0f * Relu::value(h)}; }
};

// body(activation), for a gated one with that of its gate.
template <class Body>
FASTLM_DEVICE void with_activation(Activation a, const Body& body) {
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

}  // namespace fastlm::cuda
