#include "server/metrics/exposer.h"

#include <CivetServer.h>
#include <netdb.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <exception>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "prometheus/text_serializer.h"

namespace lamina {
namespace {

// A connection that says nothing has a thread to itself until patience ends; browsers open some in
// advance. Probes must get through beside them.
constexpr const char* kThreads = "16";
constexpr const char* kPatience = "5000";  // ms

// What the HTTP server said while it started, on this thread: its exception does not say why.
thread_local std::string start_messages;

int KeepMessage(const mg_connection*, const char* message) {
  absl::StrAppend(&start_messages, start_messages.empty() ? "" : "; ", message);
  return 1;  // it shall not print it itself
}

// Connects to the address and hangs up. What goes wrong is of no interest.
void Knock(const TcpAddress& address, int port) {
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  if (getaddrinfo(address.bare_host().c_str(), std::to_string(port).c_str(), &hints, &found) != 0)
    return;
  for (const addrinfo* a = found; a != nullptr; a = a->ai_next) {
    const int fd = socket(a->ai_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0) continue;
    static_cast<void>(connect(fd, a->ai_addr, a->ai_addrlen));
    close(fd);
  }
  freeaddrinfo(found);
}

const char* Reason(int code) {
  switch (code) {
    case 200:
      return "OK";
    case 401:
      return "Unauthorized";
    case 404:
      return "Not Found";
    case 405:
      return "Method Not Allowed";
    case 503:
      return "Service Unavailable";
    default:
      return "Internal Server Error";
  }
}

void Send(mg_connection* connection, const HttpAnswer& answer, bool with_body) {
  const std::string head = absl::StrCat(
      "HTTP/1.1 ", answer.code, " ", Reason(answer.code), "\r\nContent-Type: ", answer.type,
      "\r\nContent-Length: ", answer.body.size(), answer.code == 405 ? "\r\nAllow: GET, HEAD" : "",
      answer.code == 401 ? "\r\nWWW-Authenticate: Bearer" : "",
      "\r\nCache-Control: no-store\r\nContent-Security-Policy: ", answer.content_policy,
      "\r\nX-Content-Type-Options: nosniff\r\nX-Frame-Options: DENY"
      "\r\nReferrer-Policy: no-referrer\r\n\r\n");
  mg_write(connection, head.data(), head.size());
  if (with_body) mg_write(connection, answer.body.data(), answer.body.size());
}

}  // namespace

// One path. The HTTP server would hand it what lies below the path too.
class MetricsExposer::Page final : public CivetHandler {
 public:
  // `guard` outlives the page.
  Page(std::string path, HttpPage page, const HttpGuard& guard)
      : path_(std::move(path)), page_(std::move(page)), guard_(guard) {}

  bool handleGet(CivetServer*, mg_connection* connection) override {
    return Answer(connection, true);
  }
  bool handleHead(CivetServer*, mg_connection* connection) override {
    return Answer(connection, false);
  }
  bool handlePost(CivetServer*, mg_connection* connection) override { return Refuse(connection); }
  bool handlePut(CivetServer*, mg_connection* connection) override { return Refuse(connection); }
  bool handleDelete(CivetServer*, mg_connection* connection) override { return Refuse(connection); }
  bool handlePatch(CivetServer*, mg_connection* connection) override { return Refuse(connection); }
  bool handleOptions(CivetServer*, mg_connection* connection) override {
    return Refuse(connection);
  }

 private:
  bool Answer(mg_connection* connection, bool with_body) {
    const mg_request_info* const request = mg_get_request_info(connection);
    const std::string path = request->local_uri == nullptr ? "" : request->local_uri;
    HttpAnswer answer;
    const char* const authorization = mg_get_header(connection, "Authorization");
    if (guard_ && !guard_(path_, authorization == nullptr ? "" : authorization)) {
      answer = {.code = 401, .body = "needs the header Authorization: Bearer TOKEN\n"};
    } else if (path != path_) {
      answer = {.code = 404, .body = "nothing here\n"};
    } else {
      try {
        answer = page_(request->query_string == nullptr ? "" : request->query_string);
      } catch (const std::exception& error) {  // memory that ran out
        answer = {.code = 500, .body = absl::StrCat(error.what(), "\n")};
      }
    }
    Send(connection, answer, with_body);
    return true;
  }

  static bool Refuse(mg_connection* connection) {
    Send(connection, {.code = 405, .body = "read-only: GET and HEAD\n"}, true);
    return true;
  }

  const std::string path_;
  const HttpPage page_;
  const HttpGuard& guard_;
};

MetricsExposer::MetricsExposer() = default;

absl::StatusOr<std::unique_ptr<MetricsExposer>> MetricsExposer::Start(
    const std::string& address, MetricSet& metrics, std::map<std::string, HttpPage> pages,
    HttpGuard guard) {
  // Also because the HTTP server's own syntax has lists of listeners, and options behind ports.
  const std::optional<TcpAddress> tcp = ParseTcpAddress(address);
  if (!tcp)
    return absl::InvalidArgumentError(
        absl::StrCat("metrics address \"", address, "\" must be HOST:PORT with PORT in 0..65535"));
  std::unique_ptr<MetricsExposer> result(new MetricsExposer);
  result->guard_ = std::move(guard);
  start_messages.clear();
  CivetCallbacks callbacks;
  callbacks.log_message = KeepMessage;
  pages["/metrics"] = [collectable = metrics.collectable()](const std::string&) {
    return HttpAnswer{.type = "text/plain; version=0.0.4; charset=utf-8",
                      .body = prometheus::TextSerializer().Serialize(collectable->Collect())};
  };
  std::string paths;
  for (const auto& [path, page] : pages) absl::StrAppend(&paths, path, "\n");
  pages["/"] = [paths](const std::string&) { return HttpAnswer{.body = paths}; };
  for (auto& [path, page] : pages)
    result->pages_[path] = std::make_unique<Page>(path, std::move(page), result->guard_);
  try {
    result->server_ = std::make_unique<CivetServer>(
        std::vector<std::string>{"listening_ports", address, "num_threads", kThreads,
                                 "request_timeout_ms", kPatience, "enable_keep_alive", "no"},
        &callbacks);
    for (const auto& [path, page] : result->pages_) result->server_->addHandler(path, page.get());
    const std::vector<int> ports = result->server_->getListeningPorts();
    if (ports.empty())
      return absl::UnavailableError(absl::StrCat("metrics: can't listen on ", address));
    result->port_ = ports.front();
  } catch (const std::exception& error) {
    return absl::UnavailableError(
        absl::StrCat("metrics: can't listen on ", address, ": ",
                     start_messages.empty() ? error.what() : start_messages.c_str()));
  }
  result->tcp_ = *tcp;
  result->address_ = tcp->WithPort(result->port_);
  return result;
}

MetricsExposer::~MetricsExposer() {
  // The HTTP server looks whether it shall end when somebody connects, else every two seconds only.
  std::atomic<bool> ended{false};
  std::thread knocking([&] {
    while (!ended) {
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
      Knock(tcp_, port_);
    }
  });
  server_.reset();
  ended = true;
  knocking.join();
}

}  // namespace lamina
