// The daemon's state as one JSON object: what /statusz draws and `lamina status` prints.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "nlohmann/json_fwd.hpp"
#include "server/engine/engine.h"
#include "server/metrics/metrics.h"
#include "server/session/session_manager.h"

namespace lamina {

// A daemon's life. A device that failed is the engine's to tell.
enum class Phase : uint8_t { kStarting, kServing, kDraining };

// All that a report looks at; outlives it.
struct StatusSources {
  Engine& engine;
  SessionManager& sessions;
  MetricSet& metrics;
  const std::atomic<Phase>& phase;
  std::string version, commit;
  absl::Time started;
  std::vector<std::string> listen;  // set before the phase leaves kStarting, looked at later
  std::string broker;               // its path; empty: none
};

// "starting", "serving", "draining" or "failed", and why the last.
struct Readiness {
  const char* state = "";
  std::string reason;
  bool ready() const;  // serving
  bool alive() const;  // not failed
};
Readiness ReadinessOf(const StatusSources& sources);

// Waits for no step. At most kReportedSessions sessions, those that hold the most, and
// kReportedSteps steps, the last ones; docs/operations.md describes the fields. Times are seconds,
// sizes bytes. Threads: any.
inline constexpr size_t kReportedSessions = 50;
inline constexpr size_t kReportedSteps = 20;
nlohmann::ordered_json StatusReport(const StatusSources& sources);

}  // namespace lamina
