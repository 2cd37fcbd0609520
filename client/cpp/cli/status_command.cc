// lamina status: the daemon's own report, fetched over HTTP and put into words.
#include <civetweb.h>

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "cli/commands.h"
#include "cli/output.h"
#include "nlohmann/json.hpp"
#include "src/channel.h"

namespace lamina::cli {
namespace {

using Json = nlohmann::ordered_json;

struct Address {
  std::string host;  // brackets of an IPv6 address removed
  int port = 0;
  std::string Text() const {
    return absl::StrCat(absl::StrContains(host, ':') ? absl::StrCat("[", host, "]") : host, ":",
                        port);
  }
};

// INVALID_ARGUMENT: neither http://HOST:PORT[/...] nor HOST:PORT.
absl::StatusOr<Address> ParseAddress(absl::string_view text) {
  const absl::Status bad = absl::InvalidArgumentError(absl::StrCat(
      "--metrics \"", text, "\": must be http://HOST:PORT or HOST:PORT with a port of 1 to 65535"));
  absl::string_view rest = text;
  absl::ConsumePrefix(&rest, "http://");
  rest = rest.substr(0, rest.find('/'));
  const size_t colon = rest.rfind(':');
  Address address;
  if (colon == absl::string_view::npos || colon == 0 ||
      !absl::SimpleAtoi(rest.substr(colon + 1), &address.port) || address.port < 1 ||
      address.port > 65535)
    return bad;
  address.host = std::string(rest.substr(0, colon));
  if (address.host.front() == '[') {
    if (address.host.back() != ']' || address.host.size() < 3) return bad;
    address.host = address.host.substr(1, address.host.size() - 2);
  }
  return address;
}

using client::internal::IsLoopback;

// Where the daemon's HTTP server is for who reached the daemon at `target`.
absl::StatusOr<Address> AsSeenFrom(const std::string& target, const std::string& metrics) {
  if (metrics.empty())
    return absl::FailedPreconditionError("this daemon has no HTTP server (--metrics none)");
  absl::StatusOr<Address> address = ParseAddress(metrics);
  if (!address.ok()) return address;
  const absl::StatusOr<Address> reached =
      absl::StartsWith(target, "unix:") ? absl::StatusOr<Address>(Address{.host = "127.0.0.1"})
                                        : ParseAddress(target);
  if (!reached.ok()) return address;  // a name of another kind: as the daemon says
  if (address->host == "0.0.0.0" || address->host == "::") {
    address->host = reached->host;
  } else if (IsLoopback(address->host) && !IsLoopback(reached->host)) {
    return absl::FailedPreconditionError(
        absl::StrCat("the daemon's HTTP server listens on its own host's ", metrics,
                     " alone; run this command there, or give --metrics URL of a way to it"));
  }
  return address;
}

// The header that shows the token, where there is one. There is no encryption: to another host it
// is not sent unless that is meant.
std::string Authorization(const GlobalOptions& options, const Address& address) {
  const client::Security& security = options.security;
  if (security.token_file.empty() || (!IsLoopback(address.host) && !security.insecure)) return "";
  std::ifstream file(security.token_file);
  std::string token;
  file >> token;
  return token.empty() ? "" : absl::StrCat("Authorization: Bearer ", token, "\r\n");
}

// The body of a GET. UNAVAILABLE: nobody answers. UNKNOWN: another answer than 200.
absl::StatusOr<std::string> Get(const Address& address, const std::string& path,
                                const std::string& authorization, double timeout_seconds) {
  char error[256] = "";
  mg_connection* const connection =
      mg_connect_client(address.host.c_str(), address.port, /*use_ssl=*/0, error, sizeof(error));
  if (connection == nullptr)
    return absl::UnavailableError(absl::StrCat("http://", address.Text(), ": ", error));
  struct Closer {
    mg_connection* connection;
    ~Closer() { mg_close_connection(connection); }
  } closer{connection};
  mg_printf(connection, "GET %s HTTP/1.1\r\nHost: %s\r\n%sConnection: close\r\n\r\n", path.c_str(),
            address.Text().c_str(), authorization.c_str());
  const int timeout = timeout_seconds > 0 ? static_cast<int>(std::min(timeout_seconds * 1000, 2e9))
                                          : MG_TIMEOUT_INFINITE;
  if (mg_get_response(connection, error, sizeof(error), timeout) < 0)
    return absl::UnavailableError(absl::StrCat("http://", address.Text(), path, ": ", error));
  std::string body;
  char buffer[8192];
  for (int got; (got = mg_read(connection, buffer, sizeof(buffer))) > 0;)
    body.append(buffer, static_cast<size_t>(got));
  const mg_response_info* const response = mg_get_response_info(connection);
  if (response->status_code != 200)
    return absl::UnknownError(absl::StrCat("http://", address.Text(), path, ": answers ",
                                           response->status_code, ", not 200"));
  return body;
}

uint64_t Bytes(const Json& json, const char* name) { return json.at(name).get<uint64_t>(); }
double Number(const Json& json, const char* name) { return json.at(name).get<double>(); }
std::string Text(const Json& json, const char* name) { return json.at(name).get<std::string>(); }

// What a terminal would obey is none of a name's business.
std::string Plain(std::string text) {
  for (char& c : text)
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7F) c = '?';
  return text;
}

// "[####......]": `used` of `whole`.
std::string Bar(double used, double whole) {
  constexpr int kWidth = 30;
  const double share = whole > 0 ? std::clamp(used / whole, 0.0, 1.0) : 0;
  const int filled = static_cast<int>(share * kWidth + 0.5);
  char percent[16];
  std::snprintf(percent, sizeof(percent), " %.0f %%", 100 * share);
  return absl::StrCat("[", std::string(static_cast<size_t>(filled), '#'),
                      std::string(static_cast<size_t>(kWidth - filled), '.'), "]", percent);
}

std::string Rate(double value, const char* unit) {
  const char* const prefixes[] = {"", "k", "M", "G", "T", "P"};
  size_t i = 0;
  while (value >= 1000 && i + 1 < std::size(prefixes)) value /= 1000, ++i;
  char text[48];
  std::snprintf(text, sizeof(text), "%.3g %s%s", value, prefixes[i], unit);
  return text;
}

// Rates and mean times of the last minute, a line a direction in which anything was done.
std::string Throughput(const Json& report) {
  constexpr double kWindow = 60;
  const double now = Number(report, "now");
  const double window = std::min(kWindow, std::max(1.0, Number(report, "uptime_seconds")));
  Table table({"LAST MINUTE", "STEPS/S", "SAMPLES/S", "TOKENS/S", "MEAN STEP"});
  for (const auto& [direction, seconds] : report.at("history").items()) {
    double steps = 0, samples = 0, tokens = 0, time = 0;
    for (const Json& second : seconds) {
      if (second.at(0).get<double>() <= now - kWindow) continue;
      steps += second.at(1).get<double>();
      samples += second.at(2).get<double>();
      tokens += second.at(3).get<double>();
      time += second.at(1).get<double>() * second.at(4).get<double>();
    }
    if (steps > 0)
      table.Add({direction, Rate(steps / window, ""), Rate(samples / window, ""),
                 Rate(tokens / window, ""), HumanSeconds(time / steps)});
  }
  return table.Text();
}

std::string Words(const Json& report) {
  const Json& device = report.at("device");
  const uint64_t planned = Bytes(report.at("memory"), "planned_bytes");
  const uint64_t capacity = Bytes(device, "capacity_bytes");
  const Json& checkpoints = report.at("checkpoints");
  const double saved = Number(checkpoints, "last_success");
  const Json& sessions = report.at("sessions");
  std::vector<std::pair<std::string, std::string>> lines = {
      {"daemon", absl::StrCat("laminad ", Plain(Text(report, "version")),
                              Text(report, "commit").empty()
                                  ? ""
                                  : absl::StrCat(", commit ", Plain(Text(report, "commit"))))},
      {"state",
       absl::StrCat(
           Text(report, "state"),
           Text(report, "reason").empty() ? "" : absl::StrCat(": ", Plain(Text(report, "reason"))),
           ", up ", HumanSeconds(Number(report, "uptime_seconds")))},
      {"device", Plain(absl::StrCat(Text(device, "name"), Text(device, "uuid").empty() ? "" : ", ",
                                    Text(device, "uuid")))},
      {"plan", absl::StrCat(HumanBytes(planned), " of ", HumanBytes(capacity), "  ",
                            Bar(static_cast<double>(planned), static_cast<double>(capacity)))},
      {"free", HumanBytes(Bytes(device, "free_bytes"))},
      {"queue",
       absl::StrCat(HumanCount(report.at("queue").at("depth").get<int64_t>()), " calls wait, ",
                    HumanCount(report.at("queue").at("capacity").get<int64_t>()), " may")},
      {"checkpoint",
       saved > 0 ? absl::StrCat(HumanSeconds(std::max(0.0, Number(report, "now") - saved)), " ago")
       : checkpoints.at("enabled").get<bool>() ? "none yet"
                                               : "disabled"},
      {"steps", HumanCount(report.at("steps").at("total").get<int64_t>())}};
  std::string text = Lines(lines);

  absl::StrAppend(&text, "\n\n", Throughput(report));

  Table stacks({"STACK", "LAYERS", "HIDDEN", "DTYPE", "PLAN", "CONTEXTS", "ARENA USED",
                "HIGH WATER", "ARENA", "STEP", "SKIPPED", "LOSS SCALE"});
  for (const Json& stack : report.at("stacks")) {
    const Json& config = stack.at("config");
    char scale[32];
    std::snprintf(scale, sizeof(scale), "%g", Number(stack, "loss_scale"));
    stacks.Add(
        {Plain(Text(stack, "name")), HumanCount(config.at("num_hidden_layers").get<int64_t>()),
         HumanCount(config.at("hidden_size").get<int64_t>()), Text(config, "dtype"),
         HumanBytes(Bytes(stack, "planned_bytes")), HumanCount(stack.at("contexts").get<int64_t>()),
         HumanBytes(Bytes(stack, "arena_used_bytes")),
         HumanBytes(Bytes(stack, "arena_high_water_bytes")),
         HumanBytes(Bytes(stack, "arena_bytes")),
         HumanCount(stack.at("optimizer_step").get<int64_t>()),
         HumanCount(stack.at("skipped_steps").get<int64_t>()), scale});
  }
  absl::StrAppend(&text, "\n\n", stacks.Text());

  Table held({"CLIENT", "SESSION", "STATE", "AGE", "REGIONS", "REGION BYTES", "CONTEXTS",
              "ACTIVATION BYTES"});
  for (const Json& session : sessions.at("list")) {
    const std::string name = Plain(Text(session, "client"));
    held.Add({name.empty() ? "(no name)" : name, HumanCount(session.at("session").get<int64_t>()),
              Text(session, "state"), HumanSeconds(Number(session, "age_seconds")),
              HumanCount(session.at("regions").get<int64_t>()),
              HumanBytes(Bytes(session, "region_bytes")),
              HumanCount(session.at("contexts").get<int64_t>()),
              HumanBytes(Bytes(session, "activation_bytes"))});
  }
  absl::StrAppend(&text, "\n\n", held.Text());
  const size_t shown = sessions.at("list").size();
  if (const size_t live = sessions.at("live").get<size_t>(); live > shown)
    absl::StrAppend(&text, "\nand ", live - shown, " sessions more, which hold less");

  Table steps({"LAST STEPS", "DIRECTION", "STACK", "QUEUE", "INPUT", "COMPUTE", "OUTPUT", "TOTAL",
               "TOKENS", "FLOP/S", "REQUEST"},
              /*text_last=*/true);
  const Json& last = report.at("steps").at("last");
  for (auto step = last.rbegin(); step != last.rend(); ++step) {
    steps.Add({HumanCount(step->at("number").get<int64_t>()), Text(*step, "direction"),
               Plain(Text(*step, "stack")), HumanSeconds(Number(*step, "queue_seconds")),
               HumanSeconds(Number(*step, "input_seconds")),
               HumanSeconds(Number(*step, "compute_seconds")),
               HumanSeconds(Number(*step, "output_seconds")),
               HumanSeconds(Number(*step, "total_seconds")),
               HumanCount(static_cast<int64_t>(Number(*step, "tokens"))),
               Rate(Number(*step, "flops_per_second"), ""), Plain(Text(*step, "request_id"))});
  }
  absl::StrAppend(&text, "\n\n", steps.Text());
  return text;
}

int Show(const GlobalOptions& options, const Address& address) {
  const absl::StatusOr<std::string> body =
      Get(address, "/statusz.json", Authorization(options, address), options.timeout_seconds);
  if (!body.ok()) {
    Fail(options, body.status());
    return absl::IsUnavailable(body.status()) ? kUnreachable : kRefused;
  }
  try {
    const Json report = Json::parse(*body);
    const std::string words = Words(report);  // also of JSON: it is laminad's if this can be said
    if (options.json) {
      PrintText(report.dump(2));
    } else {
      PrintText(words);
    }
  } catch (const nlohmann::json::exception& error) {
    return Fail(options, absl::UnknownError(
                             absl::StrCat("http://", address.Text(),
                                          "/statusz.json: is not a laminad's: ", error.what())));
  }
  return kOk;
}

}  // namespace

int Status(const GlobalOptions& options, const std::string& metrics) {
  if (!metrics.empty()) {
    const absl::StatusOr<Address> address = ParseAddress(metrics);
    if (!address.ok()) return FailUsage(options, std::string(address.status().message()));
    return Show(options, *address);
  }
  return WithClient(options, [&](const client::Client& daemon) {
    const absl::StatusOr<client::ServerInfo> info = daemon.Info();
    if (!info.ok()) return Fail(options, info.status());
    const absl::StatusOr<Address> address = AsSeenFrom(daemon.target(), info->metrics_address);
    if (!address.ok()) return Fail(options, address.status());
    return Show(options, *address);
  });
}

}  // namespace lamina::cli
