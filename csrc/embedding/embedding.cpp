// embedding.h on the CPU. The forward pass copies rows. In the backward pass the ids come sorted: the places of one id are
// a segment, and a segment is summed by the thread in whose share it begins.
#include "embedding/embedding.h"

#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>

#include "common/parallel.h"
#include "common/rows.h"
#include "common/simd.h"

namespace fastlm::FASTLM_ISA {
namespace {

// So many rows are summed by themselves before they are added to the total: the error of a sum of n numbers grows like
// n / kRun + kRun, not like n. The common words of a language fill several hundred places of a batch.
constexpr int64_t kRun = 64;

int64_t id_of(const EmbeddingForward& p, int64_t i) {
  return p.wide_ids ? static_cast<const int64_t*>(p.ids)[i] : static_cast<const int32_t*>(p.ids)[i];
}

template <class T>
void sum_segment(const EmbeddingBackward& p, int64_t begin, int64_t end, float* run, float* total) {
  T* out = static_cast<T*>(p.dweight) + p.keys[begin] * p.cols;
  const auto add = [&](const auto* row, float* to, const T* next, bool first) {
    over_row(p.cols, [&](auto at, int64_t c, int) {
      prefetch(next + c);
      if (first) prefetch_to_write(out + c);
      at.store(to + c, first ? at.load(row + c) : at.load(to + c) + at.load(row + c));
    });
  };
  const T* dy = static_cast<const T*>(p.dy);
  for (int64_t first = begin; first < end; first += kRun) {
    const int64_t last = std::min(end, first + kRun);
    float* to = first == begin ? total : run;
    for (int64_t i = first; i < last; ++i) {
      const T* next = dy + p.order[std::min(i + 1, p.count - 1)] * p.dy_stride;
      add(dy + p.order[i] * p.dy_stride, to, next, i == first);
    }
    if (first != begin) add(run, total, dy + p.order[std::min(last, p.count - 1)] * p.dy_stride, false);
  }
  over_row(p.cols, [&](auto at, int64_t c, int) { at.store(out + c, at.load(total + c)); });
}

}  // namespace

void embedding_forward_cpu(const EmbeddingForward& p) {
  for (int64_t i = 0; i < p.count; ++i) {
    if (id_of(p, i) >= 0 && id_of(p, i) < p.vocabulary) continue;
    throw std::invalid_argument("embedding: id " + std::to_string(id_of(p, i)) + " at place " + std::to_string(i) +
                                " is out of range; wanted 0 to " + std::to_string(p.vocabulary - 1));
  }
  const int64_t bytes = p.cols * size_of(p.type), stride = p.weight_stride * size_of(p.type);
  parallel_for(p.count, std::max<int64_t>(1, kGrain / p.cols), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const char* next = static_cast<const char*>(p.weight) + id_of(p, std::min(i + 1, p.count - 1)) * stride;
      char* y = static_cast<char*>(p.y) + (i + 1) * bytes;
      for (int64_t k = 0; k < bytes; k += kLine) prefetch(next + k), prefetch_to_write(y + k);
      std::memcpy(static_cast<char*>(p.y) + i * bytes, static_cast<const char*>(p.weight) + id_of(p, i) * stride, bytes);
    }
  });
}

void embedding_backward_cpu(const EmbeddingBackward& p) {
  with_type(p.type, [&](auto type) {
    parallel_for(p.count, std::max<int64_t>(1, kGrain / p.cols), [&](int64_t begin, int64_t end) {
      const std::unique_ptr<float[]> buffer(new float[2 * p.cols]);
      for (int64_t i = begin; i < end;) {
        int64_t after = i + 1;
        while (after < p.count && p.keys[after] == p.keys[i]) ++after;
        const bool begins_here = i == 0 || p.keys[i - 1] != p.keys[i];
        if (begins_here && p.keys[i] != p.padding) {
          sum_segment<decltype(type)>(p, i, after, buffer.get(), buffer.get() + p.cols);
        }
        i = after;
      }
    });
  });
}

}  // namespace fastlm::FASTLM_ISA

FASTLM_DISPATCH(embedding_forward_cpu, (const EmbeddingForward& p), (p))
FASTLM_DISPATCH(embedding_backward_cpu, (const EmbeddingBackward& p), (p))
