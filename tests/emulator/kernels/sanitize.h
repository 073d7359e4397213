// What the programs for the sanitizers share.
#pragma once
#include <cstdint>
#include <cstdlib>

// A buffer of exactly this many bytes that starts `shift` bytes after a multiple of 128.
struct Buffer {
  void* block = nullptr;
  unsigned char* data;
  explicit Buffer(int64_t bytes, int shift = 0) {
    if (posix_memalign(&block, 128, static_cast<size_t>(bytes + shift)) != 0) std::abort();
    data = static_cast<unsigned char*>(block) + shift;
    for (int64_t i = 0; i < bytes; i++) data[i] = static_cast<unsigned char>(i % 3 == 1 ? 0x3c : 0x10);
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { std::free(block); }
  float* floats() const { return reinterpret_cast<float*>(data); }
};
