// The HTTP server of the metrics port: /metrics, and what else it is told to show. Read-only: GET
// and HEAD are all that it knows.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "server/metrics/metrics.h"
#include "server/tcp_address.h"

class CivetServer;

namespace lamina {

// What a page answers with. Nothing may be cached, framed or guessed at.
struct HttpAnswer {
  int code = 200;
  std::string type = "text/plain; charset=utf-8";
  std::string body;
  std::string content_policy = "default-src 'none'";  // Content-Security-Policy
};

// Called from the server's threads, several at a time. `query` is what follows the question mark.
using HttpPage = std::function<HttpAnswer(const std::string& query)>;

// Whether a request for the path with this Authorization header (empty: none) is answered; else it
// gets 401. Threads as a page's.
using HttpGuard = std::function<bool(const std::string& path, const std::string& authorization)>;

class MetricsExposer {
 public:
  // `address` is "HOST:PORT", HOST an IPv4 address, a bracketed IPv6 address or a host name; port 0
  // takes a free one. `pages` by path ("/statusz"), beside /metrics; "/" lists them. `guard`
  // may be empty: all is answered.
  // INVALID_ARGUMENT: not of that form. UNAVAILABLE: can't be listened on (in use, not this
  // machine's). `metrics` may go before the exposer does; what the pages look at may not.
  static absl::StatusOr<std::unique_ptr<MetricsExposer>> Start(
      const std::string& address, MetricSet& metrics, std::map<std::string, HttpPage> pages = {},
      HttpGuard guard = {});
  ~MetricsExposer();  // stops listening; no page runs any more

  int port() const { return port_; }                       // the real one
  const std::string& address() const { return address_; }  // "HOST:PORT" with the real port

 private:
  class Page;

  MetricsExposer();
  HttpGuard guard_;
  std::map<std::string, std::unique_ptr<Page>> pages_;
  std::unique_ptr<CivetServer> server_;  // goes before the pages
  TcpAddress tcp_;
  std::string address_;
  int port_ = 0;
};

}  // namespace lamina
