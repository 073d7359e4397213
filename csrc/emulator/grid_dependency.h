// griddepcontrol: a kernel that may begin before the kernel in front of it has ended, and then has to wait for it.
#pragma once
#include "emulator/site.h"

namespace fastlm::emulator {

struct GridDependency {
  bool programmatic = false;  // the launch allowed it to begin early
  bool waited = false;        // some thread has executed griddepcontrol.wait
};

void griddepcontrol_wait(Site site);
void griddepcontrol_launch_dependents(Site site);
void begin_grid_dependency(bool programmatic);
const char* missing_grid_dependency();  // a message, or null

}  // namespace fastlm::emulator
