// How the emulator runs a grid: FASTLM_EMULATOR_SCHEDULE (fifo, lifo, random), FASTLM_EMULATOR_SEED (of random),
// FASTLM_EMULATOR_RESIDENT (the most blocks, or clusters, that run at a time), FASTLM_EMULATOR_SHARED (the most bytes of
// shared memory that a block may have: less than an H100's are a smaller GPU's), FASTLM_EMULATOR_MULTIPROCESSORS.
#pragma once
#include <cstddef>
#include <cstdint>

namespace fastlm::emulator {

enum class Schedule { fifo, lifo, random };

struct Options {
  Schedule schedule = Schedule::fifo;
  uint64_t seed = 0;
  int resident = 64;
  size_t shared = 227 * 1024;
  int multiprocessors = 2;
};

// Read from the environment at every launch. Throws std::invalid_argument for what it does not know.
Options options_from_environment();
const char* name_of(Schedule schedule);

// The generator of the random schedule (xorshift64*; Vigna, arXiv:1402.6246). The same seed gives the same run.
class Random {
 public:
  explicit Random(uint64_t seed = 0) : state_(0x9E3779B97F4A7C15ull * (seed + 1)) {}
  uint32_t next() {
    state_ ^= state_ >> 12;
    state_ ^= state_ << 25;
    state_ ^= state_ >> 27;
    return static_cast<uint32_t>((state_ * 0x2545F4914F6CDD1Dull) >> 32);
  }
  uint32_t below(uint64_t n) { return static_cast<uint32_t>(next() % n); }
  bool one_in(uint32_t n) { return next() % n == 0; }

 private:
  uint64_t state_;
};

}  // namespace fastlm::emulator
