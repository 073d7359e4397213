// DLPack, a stable C ABI for tensors (https://dmlc.github.io/dlpack): tensors are handed to torch and read from it without a
// torch header. And the tensors that this library makes: in memory of the pool where they are large.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <new>
#include <type_traits>

#include "common/dtype.h"
#include "common/pool.h"

namespace fastlm {

struct DLDataType {
  uint8_t code, bits;
  uint16_t lanes;
};

struct DLTensor {
  void* data;
  struct {
    int32_t type, id;
  } device;
  int32_t ndim;
  DLDataType dtype;
  int64_t *shape, *strides;  // in elements
  uint64_t byte_offset;
};

constexpr int32_t kDLCPU = 1;
constexpr uint8_t kDLInt = 0, kDLFloat = 2, kDLBfloat = 4;

// What a capsule "dltensor" holds.
struct DLManagedTensor {
  DLTensor tensor;
  void* context;
  void (*deleter)(DLManagedTensor*);
};

struct DLPackVersion {
  uint32_t major, minor;
};

// The same from DLPack 1.0 on.
struct DLManagedTensorVersioned {
  DLPackVersion version;
  void* context;
  void (*deleter)(DLManagedTensorVersioned*);
  uint64_t flags;
  DLTensor tensor;
};

// The functions of a framework, from DLPack 1.2 on: a capsule "dlpack_exchange_api" that is an attribute of its tensor type.
// They return 0, or -1 with a Python exception set.
struct DLPackExchangeAPI {
  DLPackVersion version;
  DLPackExchangeAPI* previous;  // an older table; its first two fields are these for ever
  void* allocator;
  void* managed_from_py_object;
  int (*managed_to_py_object)(DLManagedTensorVersioned* stolen, void** out);
  int (*tensor_from_py_object)(void* object, DLTensor* borrowed);  // may be null
  void* current_stream;
};

// An uninitialised, contiguous CPU tensor; Managed is one of the two structs above. Its memory goes when `deleter` is called.
template <class Managed>
class OwnedTensor {
 public:
  static constexpr int kDims = 8;

  // Throws std::bad_alloc.
  static Managed* make(const int64_t* shape, int dims, DType type) {
    int64_t count = 1;
    for (int d = 0; d < dims; ++d) count *= shape[d];
    const size_t bytes = static_cast<size_t>(count * size_of(type));
    const bool pooled = bytes >= kPooledBytes;
    // A small tensor's numbers follow the struct: one block of the C library's for both.
    void* const place = std::malloc(sizeof(OwnedTensor) + (pooled ? 0 : bytes + kAlignment));
    if (place == nullptr) throw std::bad_alloc();
    OwnedTensor* const owner = new (place) OwnedTensor(shape, dims, type);
    if (pooled) {
      try {
        owner->block_ = pool_take(bytes);
      } catch (...) {
        std::free(place);
        throw;
      }
      owner->managed_.tensor.data = owner->block_.data;
    } else {
      const uintptr_t end = reinterpret_cast<uintptr_t>(owner + 1);
      owner->managed_.tensor.data = reinterpret_cast<void*>((end + kAlignment - 1) / kAlignment * kAlignment);
    }
    return &owner->managed_;
  }

 private:
  static constexpr size_t kAlignment = 64;

  OwnedTensor(const int64_t* shape, int dims, DType type) {
    int64_t stride = 1;
    for (int d = dims - 1; d >= 0; --d) {
      shape_[d] = shape[d];
      strides_[d] = stride;
      stride *= shape[d];
    }
    const uint8_t bits = static_cast<uint8_t>(8 * size_of(type));
    managed_.tensor = {nullptr, {kDLCPU, 0}, dims, {type == DType::bf16 ? kDLBfloat : kDLFloat, bits, 1}, shape_, strides_, 0};
    managed_.context = this;
    managed_.deleter = [](Managed* self) {
      OwnedTensor* const owner = static_cast<OwnedTensor*>(self->context);
      if (owner->block_.data != nullptr) pool_give(owner->block_);
      std::free(owner);
    };
    if constexpr (std::is_same_v<Managed, DLManagedTensorVersioned>) {
      managed_.version = {1, 0};
      managed_.flags = 0;
    }
  }

  PoolBlock block_;
  int64_t shape_[kDims], strides_[kDims];
  Managed managed_;
};

}  // namespace fastlm
