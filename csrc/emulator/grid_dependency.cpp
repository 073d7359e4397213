#include "emulator/grid_dependency.h"

#include "emulator/sanitizer.h"
#include "emulator/scheduler.h"

namespace fastlm::emulator {
namespace {

GridDependency dependency;

}  // namespace

// Kernels run one after the other here, so the results of the one in front are always there; what can be checked is that
// a kernel that was launched early asks for them at all.
void begin_grid_dependency(bool programmatic) { dependency = {programmatic, false}; }

const char* missing_grid_dependency() {
  if (!dependency.programmatic || dependency.waited) return nullptr;
  return "launched to overlap with the kernel in front of it, but no thread executed griddepcontrol.wait";
}

void griddepcontrol_wait(Site site) {
  Ignored ignored;
  enter("griddepcontrol.wait", site);
  dependency.waited = true;
}

void griddepcontrol_launch_dependents(Site site) {
  Ignored ignored;
  enter("griddepcontrol.launch_dependents", site);
}

}  // namespace fastlm::emulator
