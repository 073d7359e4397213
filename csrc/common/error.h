// Errors cross the Python boundary as exceptions: std::invalid_argument becomes ValueError, std::runtime_error RuntimeError.
#pragma once
#include <stdexcept>
#include <string>

namespace fastlm {

// `message` says what was got and what was wanted.
inline void check(bool ok, const char* message) {
  if (!ok) throw std::invalid_argument(message);
}

}  // namespace fastlm
