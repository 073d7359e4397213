// Unequal tasks shared out among threads, each with a buffer that the thread keeps.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdlib>

#include "common/isa.h"
#include "common/parallel.h"

namespace fastlm::FASTLM_ISA {

// Memory that a thread keeps from call to call: fresh memory costs page faults.
class ThreadBuffer {
 public:
  ~ThreadBuffer() { std::free(data_); }
  float* reserve(int64_t floats) {
    if (floats > size_) {
      std::free(data_);
      size_ = (floats + 1023) / 1024 * 1024;
      data_ = static_cast<float*>(std::aligned_alloc(64, size_ * sizeof(float)));
      if (data_ == nullptr) std::abort();
    }
    return data_;
  }
  void release_above(int64_t floats) {
    if (size_ <= floats) return;
    std::free(data_);
    data_ = nullptr;
    size_ = 0;
  }

 private:
  float* data_ = nullptr;
  int64_t size_ = 0;
};

inline ThreadBuffer& thread_buffer() {
  static thread_local ThreadBuffer buffer;
  return buffer;
}

constexpr int64_t kKeptFloats = 4 << 20;  // 16 MB a thread

// Multiply-adds to a thread at the least (about 20 microseconds): below, waking it costs more than it saves.
constexpr int64_t kLeastWork = 1 << 20;

// body(task, buffer) for each task, with a buffer of `floats` floats; `work`: the multiply-adds of all tasks. A thread
// takes the next task when it has done one, so that unequal tasks share out well; what a task computes does not depend
// on who does it.
template <class Body>
void for_each_task(int64_t tasks, int64_t work, int64_t floats, const Body& body) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min({tasks, work / kLeastWork + 1, static_cast<int64_t>(max_threads())});
  parallel_for(threads, 1, [&](int64_t, int64_t) {
    float* buffer = thread_buffer().reserve(floats);
    for (int64_t task = next++; task < tasks; task = next++) body(task, buffer);
    thread_buffer().release_above(kKeptFloats);
  });
}

}  // namespace fastlm::FASTLM_ISA
