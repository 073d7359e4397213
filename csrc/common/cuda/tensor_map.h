// Tensor maps: how TMA sees a tensor in global memory. Made on the host, passed to a kernel as `const __grid_constant__
// TensorMap`, and handed to the instructions of ptx_tma.h by address.
#pragma once
#include <stdexcept>
#include <string>

#include "common/cuda/platform.h"
#ifdef __CUDACC__
#include <cuda.h>
#else
#include "emulator/tensor_map.h"
#endif

namespace fastlm::cuda {

#ifdef __CUDACC__
using TensorMap = CUtensorMap;
enum class ElementType { u8, u16, u32, s32, u64, s64, f16, f32, f64, bf16 };
enum class Swizzle { none, b32, b64, b128 };
#else
using emulator::ElementType;
using emulator::Swizzle;
using emulator::TensorMap;
#endif

inline int64_t size_of(ElementType t) {
  switch (t) {
    case ElementType::u8: return 1;
    case ElementType::u16:
    case ElementType::f16:
    case ElementType::bf16: return 2;
    case ElementType::u64:
    case ElementType::s64:
    case ElementType::f64: return 8;
    default: return 4;
  }
}

// A tensor of rank 1 to 5, the fastest dimension first, and the box that one instruction moves.
struct TensorMapSpec {
  const void* base;          // 16-byte aligned
  ElementType type;
  int rank;
  uint64_t size[5];          // elements
  uint64_t stride_bytes[5];  // of dimensions 1 and up: multiples of 16; [0] is not used: the fastest is contiguous
  uint32_t box[5];           // elements: up to 256 in each dimension; box[0] * size_of(type) is a multiple of 16
  Swizzle swizzle;           // the fastest dimension of the box must fit into its 32, 64 or 128 bytes
  bool fill_nan = false;     // what is read out of bounds
};

namespace detail {

inline void check_spec(const TensorMapSpec& s) {
  auto wrong = [](const std::string& what) { throw std::invalid_argument("tensor map: " + what); };
  if (s.rank < 1 || s.rank > 5) wrong("rank " + std::to_string(s.rank) + "; wanted 1 to 5");
  if (reinterpret_cast<uintptr_t>(s.base) % 16 != 0) wrong("the base address is not 16-byte aligned");
  for (int d = 0; d < s.rank; d++) {
    if (s.size[d] == 0 || s.size[d] > (uint64_t{1} << 32)) wrong("size " + std::to_string(s.size[d]) + "; wanted 1 to 2^32");
    if (s.box[d] == 0 || s.box[d] > 256) wrong("a box of " + std::to_string(s.box[d]) + " elements; wanted 1 to 256");
    if (d > 0 && (s.stride_bytes[d] % 16 != 0 || s.stride_bytes[d] >= (uint64_t{1} << 40))) {
      wrong("a stride of " + std::to_string(s.stride_bytes[d]) + " bytes; wanted a multiple of 16 below 2^40");
    }
  }
  const int64_t row = s.box[0] * size_of(s.type);
  if (row % 16 != 0) wrong("a box row of " + std::to_string(row) + " bytes; wanted a multiple of 16");
  const int64_t width = s.swizzle == Swizzle::b128 ? 128 : s.swizzle == Swizzle::b64 ? 64 : 32;
  if (s.swizzle != Swizzle::none && row > width) {
    wrong("a box row of " + std::to_string(row) + " bytes; wanted at most the swizzle's " + std::to_string(width));
  }
}

}  // namespace detail

#ifdef __CUDACC__

// The encoder is in the driver. It is looked up at run time, so that the library loads where there is no driver.
inline TensorMap make_tensor_map(const TensorMapSpec& s) {
  detail::check_spec(s);
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    if (error != cudaSuccess || found != cudaDriverEntryPointSuccess) {
      throw std::runtime_error("the CUDA driver has no cuTensorMapEncodeTiled: it must be of CUDA 12 or newer");
    }
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  constexpr CUtensorMapDataType kTypes[] = {
      CU_TENSOR_MAP_DATA_TYPE_UINT8,   CU_TENSOR_MAP_DATA_TYPE_UINT16,  CU_TENSOR_MAP_DATA_TYPE_UINT32,
      CU_TENSOR_MAP_DATA_TYPE_INT32,   CU_TENSOR_MAP_DATA_TYPE_UINT64,  CU_TENSOR_MAP_DATA_TYPE_INT64,
      CU_TENSOR_MAP_DATA_TYPE_FLOAT16, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, CU_TENSOR_MAP_DATA_TYPE_FLOAT64,
      CU_TENSOR_MAP_DATA_TYPE_BFLOAT16};
  constexpr CUtensorMapSwizzle kSwizzles[] = {CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_32B,
                                              CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_SWIZZLE_128B};
  const cuuint32_t element_strides[5] = {1, 1, 1, 1, 1};
  TensorMap map;
  const CUresult result = encode(
      &map, kTypes[static_cast<int>(s.type)], static_cast<cuuint32_t>(s.rank), const_cast<void*>(s.base),
      reinterpret_cast<const cuuint64_t*>(s.size), reinterpret_cast<const cuuint64_t*>(s.stride_bytes + 1), s.box,
      element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, kSwizzles[static_cast<int>(s.swizzle)],
      CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
      s.fill_nan ? CU_TENSOR_MAP_FLOAT_OOB_FILL_NAN_REQUEST_ZERO_FMA : CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("cuTensorMapEncodeTiled failed with CUresult " + std::to_string(static_cast<int>(result)));
  }
  return map;
}

#else

inline TensorMap make_tensor_map(const TensorMapSpec& s) {
  detail::check_spec(s);
  TensorMap map{};
  map.base = static_cast<unsigned char*>(const_cast<void*>(s.base));
  map.rank = static_cast<uint8_t>(s.rank);
  map.type = s.type;
  map.swizzle = s.swizzle;
  map.fill_nan = s.fill_nan;
  for (int d = 0; d < s.rank; d++) {
    map.size[d] = s.size[d];
    map.stride[d] = d == 0 ? static_cast<uint64_t>(size_of(s.type)) : s.stride_bytes[d];
    map.box[d] = static_cast<uint16_t>(s.box[d]);
  }
  return map;
}

#endif

}  // namespace fastlm::cuda
