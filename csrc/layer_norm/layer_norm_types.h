// Which combinations of element types have kernels of their own. Every other one runs in the general kernels, which
// switch on the type at every access.
#pragma once
#include <algorithm>
#include <stdexcept>
#include <string>

#include "common/cuda/launch.h"
#include "common/cuda/vector.h"
#include "layer_norm/layer_norm.h"

namespace fastlm::cuda {

template <class T>
struct Type {
  using type = T;
};

// Calls f(Type<X>, Type<H>, Type<W>) where x, h and w are a combination that models use: h and w as x, or float32 (a
// float32 residual stream, float32 parameters). Returns whether there was one.
template <class F>
bool with_common_types(DType x, DType h, DType w, F&& f) {
  auto with_x = [&](auto x_tag) {
    using X = typename decltype(x_tag)::type;
    if (h == x && w == x) return f(Type<X>(), Type<X>(), Type<X>()), true;
    if (h == x && w == DType::f32) return f(Type<X>(), Type<X>(), Type<float>()), true;
    if (h == DType::f32 && w == x) return f(Type<X>(), Type<float>(), Type<X>()), true;
    if (h == DType::f32 && w == DType::f32) return f(Type<X>(), Type<float>(), Type<float>()), true;
    return false;
  };
  if (x == DType::bf16) return with_x(Type<__nv_bfloat16>());
  if (x == DType::f16) return with_x(Type<__half>());
  if (h == DType::f32 && w == DType::f32) return f(Type<float>(), Type<float>(), Type<float>()), true;
  return false;
}

// A one-dimensional grid. Throws std::invalid_argument beyond what gridDim.x can hold.
inline dim3 blocks_for(int64_t n) {
  if (n > 2147483647) {
    throw std::invalid_argument("layer_norm: " + std::to_string(n) + " blocks wanted, but a CUDA grid holds at most 2147483647");
  }
  return dim3(static_cast<unsigned>(n));
}

// How a block is shared out: `rows` rows at a time, each by `warps` warps.
struct RowGroups {
  int warps;
  int rows;
  int threads() const { return 32 * warps * rows; }
};

// cols elements at `vectors` vectors a thread; at least `block_warps` warps a block where several rows fit.
inline RowGroups row_groups(int64_t cols, int vectors, int block_warps) {
  const int warps = static_cast<int>(std::max<int64_t>(1, ceil_div(cols, int64_t{32} * kVector * vectors)));
  return {warps, std::max(1, block_warps / warps)};
}

}  // namespace fastlm::cuda
