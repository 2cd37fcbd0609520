#include "cli/bench/samples.h"

#include <algorithm>
#include <cmath>

#include "nlohmann/json.hpp"

namespace lamina::cli {
namespace {

std::vector<double> Sorted(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values;
}

void Append(const std::vector<double>& from, std::vector<double>* to) {
  to->insert(to->end(), from.begin(), from.end());
}

}  // namespace

double Quantile(const std::vector<double>& sorted, double share) {
  if (sorted.empty()) return 0;
  // 0.999 * 1000 is a little above 999 in binary: that is not to count as the next rank.
  const double rank = std::ceil(share * static_cast<double>(sorted.size()) - 1e-9);
  const auto index = static_cast<size_t>(std::max(rank, 1.0)) - 1;
  return sorted[std::min(index, sorted.size() - 1)];
}

void Samples::Add(double seconds, const client::StepTiming& timing) {
  latency_.push_back(seconds);
  queue_.push_back(timing.queue_seconds);
  compute_.push_back(timing.compute_seconds);
  copy_.push_back(timing.input_seconds + timing.output_seconds);
  overhead_.push_back(seconds - timing.compute_seconds);
}

void Samples::Merge(const Samples& other) {
  Append(other.latency_, &latency_);
  Append(other.queue_, &queue_);
  Append(other.compute_, &compute_);
  Append(other.copy_, &copy_);
  Append(other.overhead_, &overhead_);
  for (const auto& [code, count] : other.errors_) errors_[code] += count;
}

nlohmann::json Samples::Json(double elapsed) const {
  const std::vector<double> latency = Sorted(latency_);
  const auto at = [&latency](double share) { return 1e3 * Quantile(latency, share); };
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
  if (!compute_.empty()) {
    json["queue_median_ms"] = 1e3 * Quantile(Sorted(queue_), 0.5);
    json["compute_median_ms"] = 1e3 * Quantile(Sorted(compute_), 0.5);
    json["copy_median_ms"] = 1e3 * Quantile(Sorted(copy_), 0.5);
    json["overhead_median_ms"] = 1e3 * Quantile(Sorted(overhead_), 0.5);
  }
  return json;
}

}  // namespace lamina::cli
