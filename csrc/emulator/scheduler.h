// Which thread runs. One runs at a time, until it waits for others; every point where it may wait is an emulated
// instruction. Asynchronous work (copies, tensor-core operations) is a list of events that happen as late as the program
// allows: only when no thread can run, or, in the random schedule, at any time.
#pragma once
#include <functional>
#include <string>

#include "emulator/state.h"

namespace fastlm::emulator {

extern Thread* current;  // null: no emulated thread runs

// Ends the launch with an error at `site` in the current thread.
[[noreturn]] void fail(Site site, const char* format, ...) __attribute__((format(printf, 2, 3)));

// The current thread is about to run this instruction: noted for reports, and a chance for the others to run first.
void enter(const char* instruction, Site site);

void make_ready(Thread* thread);
void suspend();  // until somebody calls make_ready
void yield();    // lets others run
void preempt();  // lets others run, sometimes, in the random schedule
void poll();     // lets others run until something has changed: called in a loop that waits for memory

// An event: runs later, outside every thread. It happens after everything that the current thread did before. `into`: the
// block whose shared memory it will change, which must not end before it; null: none.
void defer(Block* into, Site site, std::function<void()> event);
std::string under_way(const Block& block);  // a message where the block ends before such an event, else empty
void note_progress();  // memory or a barrier changed, so polling threads may look again

Random& random_source();
bool random_schedule();

// ---- for launch.cpp
void begin_schedule(const Options& options, std::function<bool()> more_blocks);
// Runs threads until a block has ended, a block is wanted, or an error occurred.
enum class Pause { block_ended, block_wanted, error, idle };
Pause run_threads();
void enlist(Thread* thread);  // a new thread, ready to run
void dismiss_block(const Block* block);
void thread_ended();  // the current thread has nothing left to do; does not return
void finish_events();  // those that outlive their blocks, such as a store's write to global memory
void drop_schedule();
const std::string& schedule_error();
std::string describe_schedule();

}  // namespace fastlm::emulator
