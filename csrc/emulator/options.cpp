#include "emulator/options.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace fastlm::emulator {
namespace {

uint64_t number(const char* variable, uint64_t otherwise) {
  const char* text = std::getenv(variable);
  if (text == nullptr || *text == 0) return otherwise;
  char* end = nullptr;
  const uint64_t value = std::strtoull(text, &end, 10);
  if (*end != 0) throw std::invalid_argument(std::string(variable) + "=" + text + "; wanted a whole number");
  return value;
}

}  // namespace

const char* name_of(Schedule schedule) {
  return schedule == Schedule::fifo ? "fifo" : schedule == Schedule::lifo ? "lifo" : "random";
}

Options options_from_environment() {
  Options o;
  const char* text = std::getenv("FASTLM_EMULATOR_SCHEDULE");
  const std::string schedule = text == nullptr ? "" : text;
  if (schedule == "lifo") o.schedule = Schedule::lifo;
  else if (schedule == "random") o.schedule = Schedule::random;
  else if (!schedule.empty() && schedule != "fifo") {
    throw std::invalid_argument("FASTLM_EMULATOR_SCHEDULE=" + schedule + "; wanted fifo, lifo or random");
  }
  o.seed = number("FASTLM_EMULATOR_SEED", 0);
  o.resident = static_cast<int>(number("FASTLM_EMULATOR_RESIDENT", 64));
  if (o.resident < 1) throw std::invalid_argument("FASTLM_EMULATOR_RESIDENT=0; wanted at least 1");
  o.shared = number("FASTLM_EMULATOR_SHARED", o.shared);
  o.multiprocessors = static_cast<int>(number("FASTLM_EMULATOR_MULTIPROCESSORS", 2));
  if (o.multiprocessors < 1) throw std::invalid_argument("FASTLM_EMULATOR_MULTIPROCESSORS=0; wanted at least 1");
  return o;
}

}  // namespace fastlm::emulator
