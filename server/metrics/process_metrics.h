// The process's own figures under the names that every Prometheus client uses.
#pragma once

#include "prometheus/counter.h"
#include "prometheus/gauge.h"
#include "prometheus/registry.h"

namespace lamina {

// Threads: Read from one at a time.
class ProcessMetrics {
 public:
  explicit ProcessMetrics(prometheus::Registry& registry);

  // Asks the system. What it does not say stays as it was.
  void Read();

 private:
  prometheus::Gauge *start_time_, *resident_, *open_fds_, *max_fds_;
  prometheus::Counter* cpu_seconds_;
};

}  // namespace lamina
