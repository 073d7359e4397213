// The table's C interface; on a GPU it also moves the words there and back.
#include "harness.h"
#ifndef __CUDACC__
#include "emulator/conflicts.h"
#endif

namespace {

std::string error;

#ifdef __CUDACC__
void check(cudaError_t e) {
  if (e != cudaSuccess) throw std::runtime_error(cudaGetErrorString(e));
}

void run_on_device(const harness::Case& c, const uint32_t* in, uint32_t* out) {
  uint32_t *device_in = nullptr, *device_out = nullptr;
  check(cudaMalloc(&device_in, 4 * c.in_words + 256));
  check(cudaMalloc(&device_out, 4 * c.out_words + 256));
  check(cudaMemcpy(device_in, in, 4 * c.in_words, cudaMemcpyHostToDevice));
  check(cudaMemcpy(device_out, out, 4 * c.out_words, cudaMemcpyHostToDevice));
  c.run(device_in, device_out);
  check(cudaDeviceSynchronize());
  check(cudaMemcpy(out, device_out, 4 * c.out_words, cudaMemcpyDeviceToHost));
  check(cudaFree(device_in));
  check(cudaFree(device_out));
}
#else
void run_on_device(const harness::Case& c, const uint32_t* in, uint32_t* out) { c.run(in, out); }
#endif

}  // namespace

HARNESS_EXPORT int harness_count() { return static_cast<int>(harness::cases().size()); }
HARNESS_EXPORT const char* harness_name(int i) { return harness::cases()[i].name; }
HARNESS_EXPORT int harness_in_words(int i) { return harness::cases()[i].in_words; }
HARNESS_EXPORT int harness_out_words(int i) { return harness::cases()[i].out_words; }

// Returns null, or what went wrong. `in` and `out` are 128-byte aligned.
HARNESS_EXPORT const char* harness_run(int i, const uint32_t* in, uint32_t* out) {
  try {
    run_on_device(harness::cases()[i], in, out);
  } catch (const std::exception& e) {
    error = e.what();
    return error.c_str();
  }
  return nullptr;
}

#ifndef __CUDACC__
// How often shared memory is read for a matrix whose rows are at these eight addresses.
HARNESS_EXPORT int harness_wavefronts(const uint32_t* address) {
  uint32_t rows[8];
  for (int i = 0; i < 8; i++) rows[i] = address[i];
  return fastlm::emulator::wavefronts(rows);
}
#endif
