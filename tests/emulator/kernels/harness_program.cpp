// Runs cases by name, for the sanitizers: program CASE...
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "harness.h"

namespace {

// Exactly this many words, so that AddressSanitizer knows where they end.
uint32_t* allocate(int words) {
  void* p = nullptr;
  if (posix_memalign(&p, 128, 4 * static_cast<size_t>(words)) != 0) std::abort();
  return static_cast<uint32_t*>(p);
}

// Small integers as pairs of bfloat16.
uint32_t* numbers(int words) {
  uint32_t* p = allocate(words);
  uint32_t state = 1;
  auto next = [&] {
    state = state * 1664525 + 1013904223;
    const float v = static_cast<float>(state >> 24) / 32 - 4;
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    return bits >> 16;
  };
  for (int i = 0; i < words; i++) p[i] = next() | next() << 16;
  return p;
}

int run(const char* name) {
  for (const harness::Case& c : harness::cases()) {
    if (std::strcmp(c.name, name) != 0) continue;
    uint32_t* in = numbers(c.in_words);
    uint32_t* out = allocate(c.out_words);
    std::memset(out, 0, 4 * static_cast<size_t>(c.out_words));
    int failed = 0;
    try {
      c.run(in, out);
    } catch (const std::exception& e) {
      std::printf("%s\n", e.what());
      failed = 3;
    }
    std::free(in);
    std::free(out);
    return failed;
  }
  std::printf("no such case: %s\n", name);
  return 4;
}

}  // namespace

int main(int count, char** names) {
  for (int i = 1; i < count; i++) {
    if (const int failed = run(names[i])) return failed;
  }
  return 0;
}
