// exp, tanh, the logistic function and the normal distribution on Vec. The bounds are against the exact value, found by
// going through float32's range (tests/test_simd_math.py); "ulp" is a unit in the last place of the result.
//
// The polynomials are minimax fits (Remez) on the stated intervals. NaN gives NaN.
#pragma once
#include "common/simd.h"

namespace fastlm::FASTLM_ISA {

// e^x, to 1 ulp (subnormal results: to the last bit). Overflows to infinity.
// x = n ln 2 + r, |r| <= ln 2 / 2:  e^r = 1 + r + r^2 P(r), to 3e-9.
inline Vec exp(Vec x) {
  x = min(set1(89.0f), max(set1(-104.0f), x));  // beyond: infinity, 0
  const Vec magic = set1(12582912.0f);          // 1.5 * 2^23: adding it rounds to a whole number
  const Vec n = fma(x, set1(1.44269504f), magic) - magic;
  const Vec r = fma(n, set1(-0x1.7f7d1cp-20f), fma(n, set1(-0x1.62e4p-1f), x));  // ln 2 in two parts; n times the first is exact
  Vec p = fma(r, set1(0.00138144650f), set1(0.00836878038f));
  p = fma(p, r, set1(0.0416683943f));
  p = fma(p, r, set1(0.166665201f));
  p = fma(p, r, set1(0.499999934f));
  return ldexp(fma(p * r, r, r) + set1(1.0f), n);
}

// 1 / (1 + e^-x), to 3 ulp for x >= -87; below, where it is less than 2e-38, to 0.
inline Vec logistic(Vec x) { return set1(1.0f) / (set1(1.0f) + exp(zero() - x)); }

// tanh x, to 2 ulp.
// |x| < 0.625: x + x^3 P(x^2), to 4e-9. Else 1 - 2 / (e^2|x| + 1).
inline Vec tanh(Vec x) {
  const Vec a = abs(x), t = x * x;
  Vec p = fma(t, set1(-0.00570498760f), set1(0.0206390876f));
  p = fma(p, t, set1(-0.0537397151f));
  p = fma(p, t, set1(0.133314422f));
  p = fma(p, t, set1(-0.333332819f));
  const Vec near = fma(p * t, a, a), far = set1(1.0f) - set1(2.0f) / (exp(a + a) + set1(1.0f));
  return copysign(if_less(a, set1(0.625f), near, far), x);
}

struct Normal {
  Vec cdf, density;
};

// The standard normal distribution: cdf(x) = (1 + erf(x / sqrt 2)) / 2, to 3e-7, and to 1e-6 of itself for x >= -5 (below,
// the rounding of x^2 grows); density(x) = e^(-x^2 / 2) / sqrt(2 pi), to 1e-7.
// cdf(-a) = e^(-a^2 / 2) P(1 / (1 + 0.3 a)) for a >= 0, P of degree 8, to 6e-8 of itself (after Hastings, 1955).
inline Normal normal(Vec x) {
  const Vec a = abs(x), e = exp(set1(-0.5f) * a * a);
  const Vec t = set1(1.0f) / fma(a, set1(0.3f), set1(1.0f));
  Vec p = fma(t, set1(0.0383782955f), set1(-0.169166142f));
  p = fma(p, t, set1(0.228660145f));
  p = fma(p, t, set1(-0.0765065519f));
  p = fma(p, t, set1(0.142535576f));
  p = fma(p, t, set1(0.0946835012f));
  p = fma(p, t, set1(0.121920348f));
  p = fma(p, t, set1(0.119487688f));
  p = fma(p, t, set1(7.16891754e-6f));
  const Vec tail = e * p;
  return {if_less(zero(), x, set1(1.0f) - tail, tail), e * set1(0.398942280f)};
}

}  // namespace fastlm::FASTLM_ISA
