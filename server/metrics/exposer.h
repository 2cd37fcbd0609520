// Serves the metrics over HTTP at /metrics.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "server/metrics/metrics.h"

namespace prometheus {
class Exposer;
}

namespace lamina {

class MetricsExposer {
 public:
  // `address` is "HOST:PORT", HOST an IPv4 address, a bracketed IPv6 address or a host name; port 0
  // takes a free one. INVALID_ARGUMENT: not of that form. UNAVAILABLE: can't be listened on (in
  // use, not this machine's). `metrics` may go before the exposer does.
  static absl::StatusOr<std::unique_ptr<MetricsExposer>> Start(const std::string& address,
                                                               MetricSet& metrics);
  ~MetricsExposer();  // stops listening

  int port() const { return port_; }                       // the real one
  const std::string& address() const { return address_; }  // "HOST:PORT" with the real port

 private:
  MetricsExposer() = default;
  std::shared_ptr<prometheus::Collectable> collectable_;
  std::unique_ptr<prometheus::Exposer> exposer_;
  std::string address_;
  int port_ = 0;
};

}  // namespace lamina
