// A fiber: a stack of its own and a place to go on from. The scheduler decides which one runs.
#pragma once
#include <cstddef>

namespace fastlm::emulator {

struct Fiber {
  void* stack_pointer = nullptr;
  char* stack = nullptr;  // null: the stack that the program itself runs on
  const void* bottom = nullptr;
  size_t size = 0;
  void* asan_stack = nullptr;
  void* tsan_fiber = nullptr;
  bool finished = false;  // its next switch is its last
};

// Gives the fiber an empty stack, on which `entry` will run. `entry` begins with fiber_started() and never returns.
// fresh: for ThreadSanitizer it has nothing to do with what ran on this stack before.
void prepare(Fiber& fiber, void (*entry)(), unsigned colour, bool fresh);
void fiber_started();
// Goes from the running fiber, which must be `from`, to `to`. Returns when somebody switches back.
void switch_fiber(Fiber& from, Fiber& to);
// A launch begins: the fiber of whoever calls this, outside every emulated thread.
void adopt_caller(Fiber& fiber);

}  // namespace fastlm::emulator
