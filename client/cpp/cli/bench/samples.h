// What was measured of one kind of call: how often, how it failed, where the time went.
//
// Threads: a value of one thread; each client has its own, and they are merged afterwards.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "lamina/client/types.h"
#include "nlohmann/json_fwd.hpp"

namespace lamina::cli {

// The smallest of `sorted` (ascending) that at least `share` (0..1) of all do not exceed; 0 of
// none.
double Quantile(const std::vector<double>& sorted, double share);

class Samples {
 public:
  // A call that was answered, in seconds as its client saw them and as the daemon spent them.
  void Add(double seconds, const client::StepTiming& timing);
  // What has no times of the daemon's own: a whole step.
  void Add(double seconds) { latency_.push_back(seconds); }
  void AddError(absl::StatusCode code) { ++errors_[code]; }
  void Merge(const Samples& other);

  int64_t count() const { return static_cast<int64_t>(latency_.size()); }  // without errors
  const std::map<absl::StatusCode, int64_t>& errors() const { return errors_; }
  // {"count", "errors": {status: count}, "per_second", and in milliseconds "min_ms", "median_ms",
  // "p90_ms", "p99_ms", "p999_ms", "max_ms"; of calls "queue_median_ms", "compute_median_ms",
  // "copy_median_ms", "overhead_median_ms" (latency less compute)}. `elapsed` in seconds, above 0.
  nlohmann::json Json(double elapsed) const;

 private:
  // Of the same length, but for whole steps, which have latencies alone.
  std::vector<double> latency_, queue_, compute_, copy_, overhead_;
  std::map<absl::StatusCode, int64_t> errors_;
};

}  // namespace lamina::cli
