// The entry points of OpenMP that csrc/common/parallel.cpp binds to, on std::thread. ThreadSanitizer does not know how
// libgomp's threads wait for each other (by futex) and reports races that are none; it knows std::thread. As many threads
// as OMP_NUM_THREADS says.
#include <cstdlib>
#include <thread>
#include <vector>

namespace {

struct Team {
  int thread = 0, threads = 1;
  bool parallel = false;
};
thread_local Team team;
long loops = 0;  // only the main thread begins a loop

}  // namespace

long shared_loops() { return loops; }

extern "C" {

int omp_get_max_threads() {
  const char* const wanted = std::getenv("OMP_NUM_THREADS");
  return wanted == nullptr ? 1 : std::atoi(wanted);
}
int omp_get_thread_num() { return team.thread; }
int omp_get_num_threads() { return team.threads; }
int omp_in_parallel() { return team.parallel; }

void GOMP_parallel(void (*function)(void*), void* data, unsigned count, unsigned) {
  const int threads = static_cast<int>(count);
  const auto run = [=](int thread) {
    team = {thread, threads, true};
    function(data);
    team = {};
  };
  if (threads > 1) ++loops;
  std::vector<std::thread> others;
  for (int thread = 1; thread < threads; ++thread) others.emplace_back(run, thread);
  run(0);
  for (std::thread& other : others) other.join();
}
}
