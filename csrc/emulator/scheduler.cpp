#include "emulator/scheduler.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <deque>
#include <map>

#include "emulator/cuda.h"
#include "emulator/sanitizer.h"

namespace fastlm::emulator {

Thread* current = nullptr;

namespace {

struct Event {
  const Block* into;
  Site site;
  std::function<void()> run;
  uint3 thread, block;   // whose instruction it was, for error messages
  SyncTag happened_before;
};

struct Scheduler {
  Options options;
  Random random;
  Fiber program;  // the host program, which called launch
  std::deque<Thread*> ready;
  std::vector<Thread*> polling;
  std::deque<std::unique_ptr<Event>> events;
  std::function<bool()> more_blocks;
  uint64_t progress = 0, progress_at_last_poll = 0;
  int fruitless_polls = 0;
  Pause pause = Pause::idle;
  std::string error;
  SyncTag events_done;
  void* event_fiber = nullptr;  // ThreadSanitizer's: asynchronous work is nobody's thread
};
Scheduler& s = *new Scheduler;  // never destroyed: nothing of this runs at exit

constexpr int kFruitlessPolls = 1000;
constexpr uint32_t kPreemptOneIn = 8;
constexpr uint32_t kEventOneIn = 16;

void go(Thread* next) {
  Thread* previous = current;
  current = next;
  if (next != nullptr) {
    threadIdx = next->index;
    blockIdx = next->block->index;
  }
  switch_fiber(previous != nullptr ? previous->fiber : s.program, next != nullptr ? next->fiber : s.program);
}

void pause_with(Pause pause) {
  s.pause = pause;
  if (current != nullptr) go(nullptr);
}

void run_as_nobody(Event& event) {
  if (!tsan()) return event.run();
  void* self = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(s.event_fiber, kNoSynchronisation);
  begin_ignoring();
  acquire(&event.happened_before);
  event.run();
  release(&s.events_done);
  end_ignoring();
  __tsan_switch_to_fiber(self, kNoSynchronisation);
}

void run_event(size_t i) {
  std::unique_ptr<Event> event = std::move(s.events[i]);
  s.events.erase(s.events.begin() + static_cast<std::ptrdiff_t>(i));
  note_progress();
  const uint3 thread = threadIdx, block = blockIdx;
  threadIdx = event->thread;
  blockIdx = event->block;
  run_as_nobody(*event);
  threadIdx = thread;
  blockIdx = block;
}

Thread* take_ready() {
  size_t i = 0;
  if (s.options.schedule == Schedule::lifo) i = s.ready.size() - 1;
  if (s.options.schedule == Schedule::random) i = s.random.below(s.ready.size());
  Thread* t = s.ready[i];
  if (i == 0) {
    s.ready.pop_front();
  } else {
    s.ready[i] = s.ready.back();
    s.ready.pop_back();
  }
  return t;
}

std::vector<Thread*> all_threads;  // of the resident blocks, for the report of a deadlock

std::string where_all_wait() {
  std::map<std::string, int> places;
  for (Thread* t : all_threads) {
    if (t->fiber.finished) continue;
    char text[512];
    snprintf(text, sizeof text, "%s at %s:%d", t->doing, t->site.file != nullptr ? t->site.file : "?", t->site.line);
    places[text]++;
  }
  std::string r;
  for (const auto& [place, threads] : places) r += "\n    " + std::to_string(threads) + " thread(s): " + place;
  return r;
}

void stop(const std::string& error) {
  s.error = error + " [schedule " + describe_schedule() + "]";
  if (current == nullptr) throw LaunchError(s.error);  // on the program's own stack
  pause_with(Pause::error);
}

// Runs the next thread. Comes back when the thread that called it runs again, or, in the host program, at a pause.
void schedule() {
  for (;;) {
    if (random_schedule() && !s.events.empty() && s.random.one_in(kEventOneIn)) run_event(s.random.below(s.events.size()));
    if (!s.error.empty()) return pause_with(Pause::error);
    if (!s.ready.empty()) {
      Thread* next = take_ready();
      if (next != current) go(next);
      return;
    }
    if (!s.events.empty()) {
      run_event(0);
      continue;
    }
    if (s.more_blocks()) return pause_with(Pause::block_wanted);
    if (!s.polling.empty()) {
      s.fruitless_polls = s.progress == s.progress_at_last_poll ? s.fruitless_polls + 1 : 0;
      s.progress_at_last_poll = s.progress;
      if (s.fruitless_polls > kFruitlessPolls) return stop("deadlock: threads poll memory that nobody changes" + where_all_wait());
      s.ready.assign(s.polling.begin(), s.polling.end());
      s.polling.clear();
      continue;
    }
    if (all_threads.empty()) return pause_with(Pause::idle);
    return stop("deadlock: no thread can run" + where_all_wait());
  }
}

}  // namespace

Random& random_source() { return s.random; }
bool random_schedule() { return s.options.schedule == Schedule::random; }

std::string describe_schedule() {
  std::string r = name_of(s.options.schedule);
  if (random_schedule()) r += ", seed " + std::to_string(s.options.seed);
  return r;
}

void fail(Site site, const char* format, ...) {
  char message[1024];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  const uint3 t = threadIdx, b = blockIdx;
  char place[512];
  snprintf(place, sizeof place, " [%s:%d, thread (%u, %u, %u) of block (%u, %u, %u)]", site.file != nullptr ? site.file : "?",
           site.line, t.x, t.y, t.z, b.x, b.y, b.z);
  stop(std::string(message) + place);
  __builtin_trap();  // a failed launch never resumes its threads
}

void enter(const char* instruction, Site site) {
  current->doing = instruction;
  current->site = site;
  preempt();
}

void make_ready(Thread* thread) {
  note_progress();
  s.ready.push_back(thread);
}

void suspend() { schedule(); }

void yield() {
  s.ready.push_back(current);
  schedule();
}

void preempt() {
  if (random_schedule() && s.random.one_in(kPreemptOneIn)) yield();
}

void poll() {
  s.polling.push_back(current);
  schedule();
}

void note_progress() { s.progress++; }

void defer(Block* into, Site site, std::function<void()> event) {
  s.events.push_back(std::make_unique<Event>(Event{into, site, std::move(event), threadIdx, blockIdx, {}}));
  release(&s.events.back()->happened_before);
}

std::string under_way(const Block& block) {
  for (const auto& e : s.events) {
    if (e->into != &block) continue;
    return "the block ends before an asynchronous copy into its shared memory, begun at " + std::string(e->site.file) + ":" +
           std::to_string(e->site.line);
  }
  return "";
}

void begin_schedule(const Options& options, std::function<bool()> more_blocks) {
  s.options = options;
  s.random = Random(options.seed);
  s.more_blocks = std::move(more_blocks);
  s.progress = s.progress_at_last_poll = 0;
  s.fruitless_polls = 0;
  s.error.clear();
  adopt_caller(s.program);
  if (tsan() && s.event_fiber == nullptr) s.event_fiber = __tsan_create_fiber(0);
}

void enlist(Thread* thread) {
  all_threads.push_back(thread);
  s.ready.push_back(thread);
}

void dismiss_block(const Block* block) {
  all_threads.erase(std::remove_if(all_threads.begin(), all_threads.end(), [&](Thread* t) { return t->block == block; }),
                    all_threads.end());
}

Pause run_threads() {
  s.pause = Pause::idle;
  schedule();
  return s.pause;
}

void thread_ended() {
  note_progress();
  if (current->block->live == 0) {
    pause_with(Pause::block_ended);
  } else {
    schedule();
  }
  __builtin_trap();  // an ended thread is never ready again
}

void finish_events() {
  while (!s.events.empty()) run_event(0);
  acquire(&s.events_done);
}

void drop_schedule() {
  s.ready.clear();
  s.polling.clear();
  s.events.clear();
  all_threads.clear();
}

const std::string& schedule_error() { return s.error; }

}  // namespace fastlm::emulator
