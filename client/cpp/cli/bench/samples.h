// What was measured of one kind of call: how often, how it failed, where the time went.
//
// Threads: a value of one thread; each client has its own, and they are merged afterwards.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "lamina/client/types.h"
#include "nlohmann/json_fwd.hpp"

namespace lamina::cli {

// Any number of values in memory that does not grow with it: how many lie in each bucket, and the
// largest of them. A power of two has kBucketsPerOctave buckets.
class Distribution {
 public:
  static constexpr int kBucketBits = 9;
  static constexpr int kBucketsPerOctave = 1 << kBucketBits;

  void Add(double value);
  void Merge(const Distribution& other);

  int64_t count() const { return count_; }
  size_t buckets() const { return buckets_.size(); }
  // A value of these that at least `share` (0..1) of all do not exceed; 0 of none. It is the
  // smallest such one, or above it by less than its kBucketsPerOctave-th part. The smallest and the
  // largest of all are exact.
  double Quantile(double share) const;

 private:
  struct Bucket {
    int64_t count = 0;
    double most = 0;
  };
  absl::flat_hash_map<int64_t, Bucket> buckets_;  // by number, which ascends with the values
  int64_t count_ = 0;
  double least_ = 0;
};

class Samples {
 public:
  // A call that was answered, in seconds as its client saw them and as the daemon spent them.
  void Add(double seconds, const client::StepTiming& timing);
  // What has no times of the daemon's own: a whole step.
  void Add(double seconds) { latency_.Add(seconds); }
  void AddError(absl::StatusCode code) { ++errors_[code]; }
  void Merge(const Samples& other);

  int64_t count() const { return latency_.count(); }  // without errors
  const std::map<absl::StatusCode, int64_t>& errors() const { return errors_; }
  // {"count", "errors": {status: count}, "per_second", and in milliseconds "min_ms", "median_ms",
  // "p90_ms", "p99_ms", "p999_ms", "max_ms"; of calls "queue_median_ms", "compute_median_ms",
  // "copy_median_ms", "overhead_median_ms" (latency less compute)}. `elapsed` in seconds, above 0.
  nlohmann::json Json(double elapsed) const;

 private:
  // Of as many values each, but for whole steps, which have latencies alone.
  Distribution latency_, queue_, compute_, copy_, overhead_;
  std::map<absl::StatusCode, int64_t> errors_;
};

}  // namespace lamina::cli
