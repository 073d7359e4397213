// Tensors of small numbers, and the comparison with what a plain loop makes of them, for the programs for the sanitizers.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/dtype.h"
#include "sanitize.h"

// Filled with multiples of 1/8 from -2 to 2, which every type holds exactly; `seed` tells one tensor from another.
class Tensor : public Buffer {
 public:
  const int64_t numel;
  const fastlm::DType type;

  Tensor(int64_t numel, fastlm::DType type, int64_t seed = 0, int shift = 0)
      : Buffer(numel * size_of(type), shift), numel(numel), type(type) {
    for (int64_t i = 0; i < numel; i++) set(i, static_cast<float>((i * 37 + seed * 11 + i / 33) % 33 - 16) / 8);
  }

  void set(int64_t i, float value) {  // a normal number that the type holds exactly, 0 or NaN
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (type == fastlm::DType::f32) {
      std::memcpy(data + 4 * i, &value, 4);
    } else if (type == fastlm::DType::bf16) {
      half(i, bits >> 16);
    } else if (std::isnan(value)) {
      half(i, 0x7e00);
    } else {
      half(i, value == 0.0f ? 0 : bits >> 16 & 0x8000 | ((bits & 0x7fffffff) - (112u << 23)) >> 13);
    }
  }

  float operator[](int64_t i) const {
    float value;
    if (type == fastlm::DType::f32) {
      std::memcpy(&value, data + 4 * i, 4);
      return value;
    }
    uint16_t h;
    std::memcpy(&h, data + 2 * i, 2);
    if (type == fastlm::DType::bf16) {
      const uint32_t bits = uint32_t{h} << 16;
      std::memcpy(&value, &bits, 4);
      return value;
    }
    const int exponent = h >> 10 & 31, fraction = h & 1023;
    if (exponent == 31) value = fraction != 0 ? NAN : INFINITY;
    else if (exponent == 0) value = std::ldexp(static_cast<float>(fraction), -24);
    else value = std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
    return h & 0x8000 ? -value : value;
  }

  std::vector<double> values() const {
    std::vector<double> all;
    for (int64_t i = 0; i < numel; i++) all.push_back((*this)[i]);
    return all;
  }

 private:
  void half(int64_t i, uint32_t bits) {
    const uint16_t h = static_cast<uint16_t>(bits);
    std::memcpy(data + 2 * i, &h, 2);
  }
};

// Every element within the type's rounding (and NaN where NaN is wanted), those too that nobody should have touched.
inline void compare(const std::string& name, const Tensor& got, const std::vector<double>& wanted) {
  const double tolerance = got.type == fastlm::DType::f32 ? 1e-5 : got.type == fastlm::DType::f16 ? 1e-3 : 8e-3;
  for (int64_t i = 0; i < got.numel; i++) {
    const double g = got[i], w = wanted[static_cast<size_t>(i)];
    if (std::isnan(g) ? std::isnan(w) : std::abs(g - w) <= tolerance * std::max(1.0, std::abs(w))) continue;
    throw std::runtime_error(name + ": element " + std::to_string(i) + " is " + std::to_string(g) + ", wanted " +
                             std::to_string(w));
  }
}
