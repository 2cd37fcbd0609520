#include "power.h"

#include <dlfcn.h>

#include <stdexcept>

namespace lamina::bench {
namespace {

// Of nvml.h, which a toolkit need not have.
constexpr int kSuccess = 0;
constexpr int kClockOfMultiprocessors = 1;  // NVML_CLOCK_SM

template <typename Function>
bool Find(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  return function != nullptr;
}

void CheckRead(int status, const char* what) {
  if (status != kSuccess)
    throw std::runtime_error(std::string("NVML: no ") + what + ", error " + std::to_string(status));
}

}  // namespace

std::optional<PowerMeter> PowerMeter::Open(const std::string& uuid) {
  void* library = dlopen("libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return std::nullopt;
  int (*start)() = nullptr;
  int (*find)(const char*, Device*) = nullptr;
  PowerMeter meter;
  if (!Find(library, "nvmlInit_v2", start) || !Find(library, "nvmlDeviceGetHandleByUUID", find) ||
      !Find(library, "nvmlDeviceGetTotalEnergyConsumption", meter.read_energy_) ||
      !Find(library, "nvmlDeviceGetClockInfo", meter.read_clock_)) {
    return std::nullopt;
  }
  unsigned long long millijoules = 0;
  if (start() != kSuccess || find(uuid.c_str(), &meter.device_) != kSuccess ||
      meter.read_energy_(meter.device_, &millijoules) != kSuccess) {
    return std::nullopt;
  }
  return meter;
}

double PowerMeter::Joules() const {
  unsigned long long millijoules = 0;
  CheckRead(read_energy_(device_, &millijoules), "energy");
  return static_cast<double>(millijoules) * 1e-3;
}

double PowerMeter::Megahertz() const {
  unsigned megahertz = 0;
  CheckRead(read_clock_(device_, kClockOfMultiprocessors, &megahertz), "clock");
  return megahertz;
}

}  // namespace lamina::bench
