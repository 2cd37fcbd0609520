#include "cli/bench/samples.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "nlohmann/json.hpp"

namespace lamina::cli {
namespace {

// A bucket's number is the beginning of the value's bits: exponent and kBucketBits of the mantissa.
int64_t BucketOf(double value) {
  constexpr int kMantissaBits = std::numeric_limits<double>::digits - 1;
  const auto bits = std::bit_cast<uint64_t>(std::abs(value));
  const auto number = static_cast<int64_t>(bits >> (kMantissaBits - Distribution::kBucketBits));
  return value < 0 ? -number : number;
}

}  // namespace

void Distribution::Add(double value) {
  least_ = count_ == 0 ? value : std::min(least_, value);
  ++count_;
  const auto [at, added] = buckets_.try_emplace(BucketOf(value));
  Bucket& bucket = at->second;
  ++bucket.count;
  bucket.most = added ? value : std::max(bucket.most, value);
}

void Distribution::Merge(const Distribution& other) {
  if (other.count_ == 0) return;
  least_ = count_ == 0 ? other.least_ : std::min(least_, other.least_);
  count_ += other.count_;
  for (const auto& [number, from] : other.buckets_) {
    const auto [at, added] = buckets_.try_emplace(number, from);
    if (added) continue;
    at->second.count += from.count;
    at->second.most = std::max(at->second.most, from.most);
  }
}

double Distribution::Quantile(double share) const {
  // 0.999 * 1000 is a little above 999 in binary: that is not to count as the next rank.
  const double rank = std::ceil(share * static_cast<double>(count_) - 1e-9);
  if (rank <= 1) return least_;
  std::vector<std::pair<int64_t, Bucket>> ascending(buckets_.begin(), buckets_.end());
  std::sort(ascending.begin(), ascending.end(),
            [](const auto& a, const auto& b) { return a.first < b.first; });
  int64_t below = 0;
  for (const auto& [number, bucket] : ascending) {
    below += bucket.count;
    if (static_cast<double>(below) >= rank) return bucket.most;
  }
  return ascending.back().second.most;
}

void Samples::Add(double seconds, const client::StepTiming& timing) {
  latency_.Add(seconds);
  queue_.Add(timing.queue_seconds);
  compute_.Add(timing.compute_seconds);
  copy_.Add(timing.input_seconds + timing.output_seconds);
  overhead_.Add(seconds - timing.compute_seconds);
}

void Samples::Merge(const Samples& other) {
  latency_.Merge(other.latency_);
  queue_.Merge(other.queue_);
  compute_.Merge(other.compute_);
  copy_.Merge(other.copy_);
  overhead_.Merge(other.overhead_);
  for (const auto& [code, count] : other.errors_) errors_[code] += count;
}

nlohmann::json Samples::Json(double elapsed) const {
  const auto at = [this](double share) { return 1e3 * latency_.Quantile(share); };
  nlohmann::json errors = nlohmann::json::object();
  for (const auto& [code, count] : errors_) errors[absl::StatusCodeToString(code)] = count;
  nlohmann::json json = {{"count", count()},
                         {"errors", std::move(errors)},
                         {"per_second", static_cast<double>(count()) / elapsed},
                         {"min_ms", at(0)},
                         {"median_ms", at(0.5)},
                         {"p90_ms", at(0.9)},
                         {"p99_ms", at(0.99)},
                         {"p999_ms", at(0.999)},
                         {"max_ms", at(1)}};
  if (compute_.count() > 0) {
    json["queue_median_ms"] = 1e3 * queue_.Quantile(0.5);
    json["compute_median_ms"] = 1e3 * compute_.Quantile(0.5);
    json["copy_median_ms"] = 1e3 * copy_.Quantile(0.5);
    json["overhead_median_ms"] = 1e3 * overhead_.Quantile(0.5);
  }
  return json;
}

}  // namespace lamina::cli
