// The hooks of AddressSanitizer and ThreadSanitizer. They are weak: null in a plain program.
//
// The emulator itself is never instrumented. It tells the sanitizers of the switches between threads' stacks, of the
// memory that it touches on behalf of the kernel, and of the synchronisation that CUDA gives; so ThreadSanitizer finds
// races between CUDA threads, and AddressSanitizer sees shared memory's bounds.
#pragma once
#include <cstddef>

#define FASTLM_WEAK __attribute__((weak))
extern "C" {
FASTLM_WEAK void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
FASTLM_WEAK void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* size);
FASTLM_WEAK void __asan_poison_memory_region(const volatile void* p, size_t size);
FASTLM_WEAK void __asan_unpoison_memory_region(const volatile void* p, size_t size);
FASTLM_WEAK void* __asan_region_is_poisoned(void* p, size_t size);
FASTLM_WEAK void* __tsan_get_current_fiber();
FASTLM_WEAK void* __tsan_create_fiber(unsigned flags);
FASTLM_WEAK void __tsan_destroy_fiber(void* fiber);
FASTLM_WEAK void __tsan_switch_to_fiber(void* fiber, unsigned flags);
FASTLM_WEAK void __tsan_acquire(void* p);
FASTLM_WEAK void __tsan_release(void* p);
FASTLM_WEAK void __tsan_ignore_thread_begin();
FASTLM_WEAK void __tsan_ignore_thread_end();
FASTLM_WEAK void __tsan_read_range(void* p, unsigned long size);
FASTLM_WEAK void __tsan_write_range(void* p, unsigned long size);
}

namespace fastlm::emulator {

inline bool tsan() { return __tsan_create_fiber != nullptr; }
inline bool asan() { return __asan_poison_memory_region != nullptr; }
constexpr unsigned kNoSynchronisation = 1;  // __tsan_switch_to_fiber: the switch itself orders nothing

// What happened before a release of p in one thread happened before what follows an acquire of p in another.
inline void acquire(const void* p) {
  if (__tsan_acquire != nullptr) __tsan_acquire(const_cast<void*>(p));
}
inline void release(const void* p) {
  if (__tsan_release != nullptr) __tsan_release(const_cast<void*>(p));
}

// Inside, ThreadSanitizer ignores what libc does for the emulator (its interceptors check uninstrumented callers too).
inline void begin_ignoring() {
  if (__tsan_ignore_thread_begin != nullptr) __tsan_ignore_thread_begin();
}
inline void end_ignoring() {
  if (__tsan_ignore_thread_end != nullptr) __tsan_ignore_thread_end();
}
struct Ignored {
  Ignored() { begin_ignoring(); }
  ~Ignored() { end_ignoring(); }
};

// An access that the running CUDA thread makes through the emulator, such as the copy of a cp.async. Called while ignored.
inline void kernel_reads(const void* p, size_t size) {
  if (__tsan_read_range == nullptr) return;
  end_ignoring();
  __tsan_read_range(const_cast<void*>(p), size);
  begin_ignoring();
}
inline void kernel_writes(void* p, size_t size) {
  if (__tsan_write_range == nullptr) return;
  end_ignoring();
  __tsan_write_range(p, size);
  begin_ignoring();
}

inline bool out_of_bounds(const void* p, size_t size) {
  return __asan_region_is_poisoned != nullptr && size > 0 && __asan_region_is_poisoned(const_cast<void*>(p), size) != nullptr;
}
inline void forbid(const void* p, size_t size) {
  if (__asan_poison_memory_region != nullptr) __asan_poison_memory_region(p, size);
}
inline void allow(const void* p, size_t size) {
  if (__asan_unpoison_memory_region != nullptr) __asan_unpoison_memory_region(p, size);
}

// memset and memcpy that no sanitizer intercepts: they may touch forbidden memory.
inline void fill_quietly(void* p, unsigned char value, size_t size) {
  asm volatile("rep stosb" : "+D"(p), "+c"(size) : "a"(value) : "memory");
}
inline void copy_quietly(void* to, const void* from, size_t size) {
  asm volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(size)::"memory");
}

}  // namespace fastlm::emulator
