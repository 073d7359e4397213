#include "emulator/registers.h"

#include "emulator/sanitizer.h"
#include "emulator/scheduler.h"

namespace fastlm::emulator {
namespace {

void check_count(int registers, const char* instruction, Site site) {
  if (registers % 8 != 0 || registers < 24 || registers > 256) {
    fail(site, "%s to %d registers; wanted a multiple of 8 from 24 to 256", instruction, registers);
  }
}

}  // namespace

void setmaxnreg_decrease(int registers, Site site) {
  Ignored ignored;
  check_count(registers, "setmaxnreg.dec", site);
  with_warp("setmaxnreg.dec", kAllLanes, &registers, site, [&](const LaneArguments&) {
    Warp& warp = *current->warp;
    RegisterPool& pool = warp.block->registers;
    if (registers > warp.registers) fail(site, "setmaxnreg.dec to %d registers; the warp has only %d", registers, warp.registers);
    pool.free += 32 * (warp.registers - registers);
    warp.registers = registers;
    warp.wgmma.note(static_cast<uint64_t>(1000 + registers));
    for (Thread* t : pool.waiting) make_ready(t);
    pool.waiting.clear();
  });
}

void setmaxnreg_increase(int registers, Site site) {
  Ignored ignored;
  check_count(registers, "setmaxnreg.inc", site);
  with_warp("setmaxnreg.inc", kAllLanes, &registers, site, [&](const LaneArguments&) {
    Warp& warp = *current->warp;
    if (registers < warp.registers) fail(site, "setmaxnreg.inc to %d registers; the warp has %d", registers, warp.registers);
    warp.wgmma.note(static_cast<uint64_t>(2000 + registers));
  });
  Warp& warp = *current->warp;
  RegisterPool& pool = warp.block->registers;
  while (warp.registers < registers) {  // the first lane that finds enough takes them for its warp
    const int wanted = 32 * (registers - warp.registers);
    if (pool.free >= wanted) {
      pool.free -= wanted;
      warp.registers = registers;
    } else {
      pool.waiting.push_back(current);
      suspend();
    }
  }
}

}  // namespace fastlm::emulator
