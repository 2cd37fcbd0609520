// What a GPU draws and how fast its clock goes, by the driver's NVML.
#pragma once

#include <optional>
#include <string>

namespace lamina::bench {

class PowerMeter {
 public:
  // Of the device with this UUID ("GPU-..."). Nothing where the driver's library or a counter is
  // missing. The library stays loaded until the process ends.
  static std::optional<PowerMeter> Open(const std::string& uuid);

  // Joules since the driver was loaded, of the whole board. The driver renews it some ten times a
  // second.
  double Joules() const;
  // The multiprocessors' clock at this moment.
  double Megahertz() const;

 private:
  using Device = void*;
  using ReadEnergy = int (*)(Device, unsigned long long* millijoules);
  using ReadClock = int (*)(Device, int kind, unsigned* megahertz);

  PowerMeter() = default;

  Device device_ = nullptr;
  ReadEnergy read_energy_ = nullptr;
  ReadClock read_clock_ = nullptr;
};

}  // namespace lamina::bench
