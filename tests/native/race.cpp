// A loop with a data race: what ThreadSanitizer must report. And the pool of csrc/common/pool.h used by several threads,
// in which there is none.
#include <cstdio>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "common/parallel.h"
#include "common/pool.h"

namespace {

void seeded_race() {
  double total = 0.0;
  fastlm::parallel_for(1000, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) total += static_cast<double>(i);
  });
  std::printf("%g\n", total);
}

void share_the_pool() {
  fastlm::pool_set_limit(1 << 20);
  std::vector<std::thread> threads;
  for (int t = 0; t < 3; ++t) {
    threads.emplace_back([t] {
      for (int i = 0; i < 20; ++i) {
        const fastlm::PoolBlock block = fastlm::pool_take(300000 + 10000 * (i % 3));
        std::memset(block.data, t, 300000);
        fastlm::pool_give(block);
        if (i == 10) fastlm::pool_release();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  if (fastlm::pool_state().used != 0) std::printf("%zu bytes are still in use\n", fastlm::pool_state().used);
}

}  // namespace

int main(int, char** argv) { std::string(argv[1]) == "race" ? seeded_race() : share_the_pool(); }
