// Where in the kernel's source an emulated instruction stands. Every emulated function takes one as its last argument,
// with here() as the default, which names the line of the call.
#pragma once

namespace fastlm::emulator {

struct Site {
  const char* file = nullptr;
  int line = 0;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

// What ThreadSanitizer remembers about one point of synchronisation is kept by address, for eight bytes at a time.
struct alignas(8) SyncTag {
  char bytes[8] = {};
};

}  // namespace fastlm::emulator
