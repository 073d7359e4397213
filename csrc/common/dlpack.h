// A tensor of the pool as a DLPack capsule, which torch.utils.dlpack.from_dlpack makes a torch.Tensor without a copy.
// DLPack is a stable C ABI (https://dmlc.github.io/dlpack), so this needs no torch header.
#pragma once
#include <cstdint>

#include "common/dtype.h"
#include "common/pool.h"

namespace fastlm {

struct DLTensor {
  void* data;
  struct {
    int32_t type, id;
  } device;
  int32_t ndim;
  struct {
    uint8_t code, bits;
    uint16_t lanes;
  } dtype;
  int64_t *shape, *strides;  // in elements
  uint64_t byte_offset;
};

struct DLManagedTensor {
  DLTensor tensor;
  void* context;
  void (*deleter)(DLManagedTensor*);
};

// An uninitialised, contiguous CPU tensor. Its memory returns to the pool when `deleter` is called.
class PooledTensor {
 public:
  static constexpr int kDims = 8;

  static DLManagedTensor* make(const int64_t* shape, int dims, DType type) {
    int64_t count = 1;
    for (int d = 0; d < dims; ++d) count *= shape[d];
    const PoolBlock block = pool_take(static_cast<size_t>(count * size_of(type)));
    return &(new PooledTensor(block, shape, dims, type))->managed_;
  }

 private:
  PooledTensor(PoolBlock block, const int64_t* shape, int dims, DType type) : block_(block) {
    int64_t stride = 1;
    for (int d = dims - 1; d >= 0; --d) {
      shape_[d] = shape[d];
      strides_[d] = stride;
      stride *= shape[d];
    }
    constexpr int32_t kCpu = 1;
    constexpr uint8_t kFloat = 2, kBfloat = 4;
    const uint8_t bits = static_cast<uint8_t>(8 * size_of(type));
    managed_ = {{block.data, {kCpu, 0}, dims, {type == DType::bf16 ? kBfloat : kFloat, bits, 1}, shape_, strides_, 0},
                this,
                [](DLManagedTensor* self) {
                  const PooledTensor* const owner = static_cast<PooledTensor*>(self->context);
                  pool_give(owner->block_);
                  delete owner;
                }};
  }

  PoolBlock block_;
  int64_t shape_[kDims], strides_[kDims];
  DLManagedTensor managed_;
};

}  // namespace fastlm
