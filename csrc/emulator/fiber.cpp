#include "emulator/fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <stdexcept>
#include <vector>

#include "emulator/sanitizer.h"

// Saves the callee-saved registers on this stack, stores the stack pointer in *save and goes on where `load` was saved.
extern "C" void fastlm_emulator_swap(void** save, void* load);
asm(R"(
.text
.globl fastlm_emulator_swap
.hidden fastlm_emulator_swap
.type fastlm_emulator_swap,@function
fastlm_emulator_swap:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fastlm_emulator_swap,.-fastlm_emulator_swap
.section .note.GNU-stack,"",@progbits
.text
)");

namespace fastlm::emulator {
namespace {

constexpr size_t kStack = 256 * 1024;
constexpr size_t kPage = 4096;
constexpr int kSavedRegisters = 6;

Fiber* switched_from = nullptr;  // for AddressSanitizer: the program's own stack is known only once it was left

// ThreadSanitizer gives a destroyed fiber's identity to the next one, and takes the accesses of both for one thread's.
// So the fibers of a launch live until the next launch.
std::vector<void*>& retired = *new std::vector<void*>;

char* new_stack() {
  void* p = mmap(nullptr, kPage + kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::runtime_error("the CUDA emulator: no memory for a thread's stack");
  mprotect(p, kPage, PROT_NONE);  // an overflow stops here
  return static_cast<char*>(p) + kPage;
}

// ThreadSanitizer remembers who used this memory; new pages and a new fiber make it forget the stack's last owner.
// A new fiber costs it a millisecond. Where the last one is used again (!fresh), it believes that the new thread follows
// on the stack's last owner, and sees no race between these two.
void forget_last_owner(Fiber& fiber, bool fresh) {
  mmap(fiber.stack, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  if (fiber.tsan_fiber != nullptr && fiber.finished) {
    void* self = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(fiber.tsan_fiber, kNoSynchronisation);
    end_ignoring();  // a fiber must not be destroyed while it ignores
    __tsan_switch_to_fiber(self, kNoSynchronisation);
    if (!fresh) return;
    retired.push_back(fiber.tsan_fiber);
  }
  fiber.tsan_fiber = __tsan_create_fiber(0);
}

}  // namespace

void prepare(Fiber& fiber, void (*entry)(), unsigned colour, bool fresh) {
  if (fiber.stack == nullptr) {
    fiber.stack = new_stack();
    fiber.bottom = fiber.stack;
    fiber.size = kStack;
  }
  if (!fiber.finished) allow(fiber.stack, kStack);  // its last user was abandoned in the middle of a function
  if (tsan()) forget_last_owner(fiber, fresh);
  fiber.finished = false;
  fiber.asan_stack = nullptr;
  // Stacks lie at multiples of a power of two; a different offset for each keeps their tops out of the same cache sets.
  const uintptr_t top = reinterpret_cast<uintptr_t>(fiber.stack) + kStack - 128 - colour % 61 * 320;
  void** sp = reinterpret_cast<void**>(top & ~uintptr_t{15});
  *--sp = nullptr;  // the return address of entry, so that the stack is aligned as after a call
  *--sp = reinterpret_cast<void*>(entry);
  for (int i = 0; i < kSavedRegisters; i++) *--sp = nullptr;
  fiber.stack_pointer = sp;
}

void adopt_caller(Fiber& fiber) {
  for (void* old : retired) __tsan_destroy_fiber(old);
  retired.clear();
  if (tsan()) fiber.tsan_fiber = __tsan_get_current_fiber();
}

void switch_fiber(Fiber& from, Fiber& to) {
  if (__sanitizer_start_switch_fiber != nullptr) {
    __sanitizer_start_switch_fiber(from.finished ? nullptr : &from.asan_stack, to.bottom, to.size);
  }
  switched_from = &from;
  if (__tsan_switch_to_fiber != nullptr) __tsan_switch_to_fiber(to.tsan_fiber, kNoSynchronisation);
  fastlm_emulator_swap(&from.stack_pointer, to.stack_pointer);
  if (__sanitizer_finish_switch_fiber != nullptr) {
    const void* bottom = nullptr;
    size_t size = 0;
    __sanitizer_finish_switch_fiber(from.asan_stack, &bottom, &size);
    if (switched_from->stack == nullptr) {
      switched_from->bottom = bottom;
      switched_from->size = size;
    }
  }
}

void fiber_started() {
  if (__sanitizer_finish_switch_fiber == nullptr) return;
  const void* bottom = nullptr;
  size_t size = 0;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
  if (switched_from->stack == nullptr) {
    switched_from->bottom = bottom;
    switched_from->size = size;
  }
}

}  // namespace fastlm::emulator
