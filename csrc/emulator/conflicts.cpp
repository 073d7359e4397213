#include "emulator/conflicts.h"

#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace fastlm::emulator {
namespace {

struct Counts {
  int64_t matrices = 0, wavefronts = 0;
};
Counts counts;  // of the launch; one runs at a time

}  // namespace

int wavefronts(const uint32_t (&address)[8]) {
  int most = 1;
  for (int i = 0; i < 8; i++) {
    int same_banks = 1;
    for (int j = 0; j < i; j++) {
      bool counted = false;  // rows at one address are read once
      for (int k = 0; k < j; k++) counted = counted || address[k] == address[j];
      const bool other = address[i] != address[j] && address[i] / 16 % 8 == address[j] / 16 % 8;
      same_banks += other && !counted ? 1 : 0;
    }
    most = same_banks > most ? same_banks : most;
  }
  return most;
}

void count_matrices(const uint32_t* address, int count) {
  for (int m = 0; m < count; m++) {
    uint32_t rows[8];
    for (int i = 0; i < 8; i++) rows[i] = address[8 * m + i];
    counts.matrices++;
    counts.wavefronts += wavefronts(rows);
  }
}

void begin_counts() { counts = Counts(); }

void write_counts(dim3 grid, dim3 block, size_t dynamic_shared) {
  const char* path = std::getenv("FASTLM_EMULATOR_COUNTS");
  if (path == nullptr || *path == 0) return;
  std::FILE* file = std::fopen(path, "a");
  if (file == nullptr) throw std::runtime_error(std::string("FASTLM_EMULATOR_COUNTS=") + path + ": the file cannot be written");
  std::fprintf(file, "{\"grid\": [%u, %u, %u], \"threads\": %u, \"dynamic_shared\": %zu, \"matrices\": %lld, \"wavefronts\": %lld}\n",
               grid.x, grid.y, grid.z, block.x * block.y * block.z, dynamic_shared, static_cast<long long>(counts.matrices),
               static_cast<long long>(counts.wavefronts));
  std::fclose(file);
}

}  // namespace fastlm::emulator
