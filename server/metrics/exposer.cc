#include "server/metrics/exposer.h"

#include <CivetServer.h>

#include <exception>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "prometheus/exposer.h"

namespace lamina {
namespace {

// What the HTTP server said while it started, on this thread: its exception does not say why.
thread_local std::string start_messages;

int KeepMessage(const mg_connection*, const char* message) {
  absl::StrAppend(&start_messages, start_messages.empty() ? "" : "; ", message);
  return 1;  // it shall not print it itself
}

}  // namespace

absl::StatusOr<std::unique_ptr<MetricsExposer>> MetricsExposer::Start(const std::string& address,
                                                                      MetricSet& metrics) {
  const size_t colon = address.rfind(':');
  int port = -1;
  // What follows could smuggle further listeners or options into the HTTP server's own syntax.
  const bool plain = address.find_first_of(",+ \t\r\n") == std::string::npos;
  if (colon == std::string::npos || colon == 0 || !plain ||
      address.find_first_not_of("0123456789", colon + 1) != std::string::npos ||
      !absl::SimpleAtoi(address.substr(colon + 1), &port) || port > 65535)
    return absl::InvalidArgumentError(
        absl::StrCat("metrics address \"", address, "\" must be HOST:PORT with PORT in 0..65535"));
  std::unique_ptr<MetricsExposer> result(new MetricsExposer);
  start_messages.clear();
  CivetCallbacks callbacks;
  callbacks.log_message = KeepMessage;
  try {
    result->exposer_ =
        std::make_unique<prometheus::Exposer>(address, /*num_threads=*/2, &callbacks);
    const std::vector<int> ports = result->exposer_->GetListeningPorts();
    if (ports.empty())
      return absl::UnavailableError(absl::StrCat("metrics: can't listen on ", address));
    result->port_ = ports.front();
  } catch (const std::exception& error) {
    return absl::UnavailableError(
        absl::StrCat("metrics: can't listen on ", address, ": ",
                     start_messages.empty() ? error.what() : start_messages.c_str()));
  }
  result->address_ = absl::StrCat(address.substr(0, colon), ":", result->port_);
  result->collectable_ = metrics.collectable();
  result->exposer_->RegisterCollectable(result->collectable_);
  return result;
}

MetricsExposer::~MetricsExposer() = default;

}  // namespace lamina
