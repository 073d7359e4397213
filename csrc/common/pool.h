// Memory of large CPU tensors, kept when they die and given to the next tensors that fit into it.
//
// Memory that is fresh from the system costs a page fault per 4 KB (0.5 to 2 us each; more on a virtual machine), and the C
// library gives large blocks back to the system as soon as they are freed: a training step of default PyTorch faults
// hundreds of thousands of times. The system is asked to back the pool with huge pages, which also saves misses in the TLB.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>

namespace fastlm {

// Smaller tensors are better off with the C library, which keeps memory in such sizes by itself. (fastlm/ops/memory.py has
// this number too.)
constexpr size_t kPooledBytes = size_t(256) << 10;

struct PoolBlock {
  void* data = nullptr;  // aligned to 64 KB; uninitialised
  size_t bytes = 0;      // what was asked for, rounded up to 64 KB
};

// Throws std::bad_alloc where the system has no more.
PoolBlock pool_take(size_t bytes);
void pool_give(PoolBlock block) noexcept;

// What a call needs for a moment.
class Scratch {
 public:
  explicit Scratch(size_t bytes) : block_{nullptr, bytes} {
    if (bytes >= kPooledBytes) {
      block_ = pool_take(bytes);
    } else {
      small_.reset(new char[bytes]);  // uninitialised
    }
  }
  ~Scratch() {
    if (block_.data != nullptr) pool_give(block_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* data() const { return block_.data != nullptr ? block_.data : small_.get(); }

 private:
  PoolBlock block_;
  std::unique_ptr<char[]> small_;
};

// At most this much is kept while nobody uses it (without a call: an eighth of the machine's memory); what has lain there
// longest goes back to the system first.
void pool_set_limit(size_t bytes);
void pool_release();  // give all that is unused back to the system

struct PoolState {
  size_t limit, unused, used;  // bytes
  uint64_t fresh, reused;      // takes that needed memory of the system, and those that did not
};
PoolState pool_state();

}  // namespace fastlm
