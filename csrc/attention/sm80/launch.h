// What the attention kernels' launches share: the checks of their inputs, the choice of a kernel, the grid.
#pragma once
#include <stdexcept>
#include <string>

#include "attention/sm80/span.h"
#include "common/cuda/launch.h"
#include "common/cuda/vector.h"

namespace fastlm::cuda {

template <class T, int kWidth_, bool kGeneral_>
struct Variant {
  using type = T;
  static constexpr int kWidth = kWidth_;
  static constexpr bool kGeneral = kGeneral_;
};

// Softcap, ALiBi, dropout, a scale that is not positive and float32 are in kernels of their own, so that the others'
// main loop has none of it.
inline bool has_general_kernel(const AttentionInputs& p) {
  return p.type == DType::f32 || p.softcap > 0.0f || p.alibi_slopes != nullptr || p.rng_state != nullptr || !(p.scale > 0.0f);
}

// Calls f(Variant): the width that holds the head dim, and the plain or the general kernel. float32 has the general one only.
// Where kTwoPass, only what the backward of one pass leaves.
template <bool kTwoPass = false, class F>
void with_variant(const AttentionInputs& p, F&& f) {
  auto with_width = [&](auto type, auto general) {
    using T = decltype(type);
    constexpr bool kGeneral = decltype(general)::value;
    if constexpr (!kTwoPass || sizeof(T) == 4) {
      if (p.width <= 64) return f(Variant<T, 64, kGeneral>());
      if (p.width <= 128) return f(Variant<T, 128, kGeneral>());
    }
    f(Variant<T, 256, kGeneral>());
  };
  auto with_type = [&](auto type) {
    has_general_kernel(p) ? with_width(type, std::true_type()) : with_width(type, std::false_type());
  };
  if (p.type == DType::f32) with_width(float(), std::true_type());
  else if (p.type == DType::f16) with_type(__half());
  else with_type(__nv_bfloat16());
}

inline void check_rows(const char* name, const void* data, const Strides& s, int64_t batch, int64_t rows, int64_t heads, DType type) {
  const int64_t bytes = size_of(type);
  const bool aligned = (batch < 2 || s.batch * bytes % 16 == 0) && (rows < 2 || s.row * bytes % 16 == 0) &&
                       (heads < 2 || s.head * bytes % 16 == 0);
  if (reinterpret_cast<uintptr_t>(data) % 16 != 0 || !aligned) {
    throw std::invalid_argument("attention: " + std::string(name) + " must be aligned to 16 bytes, its strides too; got the address " +
                                std::to_string(reinterpret_cast<uintptr_t>(data)) + " and strides of " + std::to_string(s.batch * bytes) +
                                ", " + std::to_string(s.row * bytes) + " and " + std::to_string(s.head * bytes) + " bytes");
  }
}

inline void check_inputs(const AttentionInputs& p) {
  if (p.width % 8 != 0 || p.width < 8 || p.width > 256) {
    throw std::invalid_argument("attention: the CUDA kernels are for head dims that are multiples of 8 up to 256, got " +
                                std::to_string(p.width));
  }
  if (p.rows > kMaxLength || p.columns > kMaxLength) {
    throw std::invalid_argument("attention: the CUDA kernels are for up to 2^29 queries and keys, got " + std::to_string(p.rows) +
                                " and " + std::to_string(p.columns));
  }
  check_rows("q", p.q, p.q_strides, p.batch, p.rows, p.heads, p.type);
  check_rows("k", p.k, p.k_strides, p.batch, p.columns, p.kv_heads, p.type);
  check_rows("v", p.v, p.v_strides, p.batch, p.columns, p.kv_heads, p.type);
}

// How the blocks are numbered: the blocks of rows of a sequence and head follow each other.
struct Grid {
  int blocks;     // of rows, of the longest sequence
  int heads;
  int sequences;  // batch entries, or packed sequences
};

// `rows`: of the longest sequence.
inline Grid grid_of(const AttentionInputs& p, int64_t rows, int64_t block_rows, int64_t heads) {
  const int64_t sequences = p.cu_seqlens == nullptr ? p.batch : p.sequences, blocks = (rows + block_rows - 1) / block_rows;
  if (blocks * heads * sequences > 2147483647) {
    throw std::invalid_argument("attention: " + std::to_string(blocks * heads * sequences) +
                                " blocks wanted, but a CUDA grid holds at most 2147483647");
  }
  return {static_cast<int>(blocks), static_cast<int>(heads), static_cast<int>(sequences)};
}

inline dim3 blocks_of(const Grid& g) { return dim3(static_cast<unsigned>(int64_t{g.blocks} * g.heads * g.sequences)); }

// The place of this block of threads.
struct Place {
  int block, head, sequence;
  FASTLM_DEVICE explicit Place(const Grid& g, int i = static_cast<int>(blockIdx.x)) {
    block = i % g.blocks;
    head = i / g.blocks % g.heads;
    sequence = i / g.blocks / g.heads;
  }
};

FASTLM_DEVICE int64_t at(const Strides& s, int64_t batch, int64_t head) { return batch * s.batch + head * s.head; }

}  // namespace fastlm::cuda
