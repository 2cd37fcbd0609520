#include "server/metrics/exposer.h"

#include <CivetServer.h>
#include <netdb.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <exception>
#include <thread>
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

// Connects to the address and hangs up. What goes wrong is of no interest.
void Knock(const std::string& address) {
  const size_t colon = address.rfind(':');
  std::string host = address.substr(0, colon);
  if (host.size() > 2 && host.front() == '[') host = host.substr(1, host.size() - 2);
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  if (getaddrinfo(host.c_str(), address.c_str() + colon + 1, &hints, &found) != 0) return;
  for (const addrinfo* a = found; a != nullptr; a = a->ai_next) {
    const int fd = socket(a->ai_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0) continue;
    static_cast<void>(connect(fd, a->ai_addr, a->ai_addrlen));
    close(fd);
  }
  freeaddrinfo(found);
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

MetricsExposer::~MetricsExposer() {
  // The HTTP server looks whether it shall end when somebody connects, else every two seconds only.
  std::atomic<bool> ended{false};
  std::thread knocking([&] {
    while (!ended) {
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
      Knock(address_);
    }
  });
  exposer_.reset();
  ended = true;
  knocking.join();
}

}  // namespace lamina
