// Commands about the daemon itself, and checkpoints.
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstring>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "cli/commands.h"
#include "cli/describe.h"
#include "nlohmann/json.hpp"

namespace lamina::cli {
namespace {

std::string TargetOf(const GlobalOptions& options) {
  if (options.target.empty()) return client::DefaultTarget();
  return options.target.front() == '/' ? absl::StrCat("unix:", options.target) : options.target;
}

// Why a Unix socket does not answer, as far as this process can see.
std::string SocketTrouble(const std::string& target) {
  if (!absl::StartsWith(target, "unix:")) return "";
  std::string path = target.substr(5);
  if (absl::StartsWith(path, "//")) path = path.substr(2);
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path.size() >= sizeof(address.sun_path)) return "the socket's path is too long";
  std::memcpy(address.sun_path, path.c_str(), path.size() + 1);
  const int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (fd < 0) return "";
  const int failed =
      connect(fd, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) != 0 ? errno : 0;
  close(fd);
  switch (failed) {
    case 0:
      return "something listens there, but it does not speak gRPC or did not answer in time";
    case ENOENT:
      return "there is no such socket: no daemon was started there";
    case ECONNREFUSED:
      return "the socket is there but nobody listens: the daemon is gone";
    case EACCES:
    case EPERM:
      return "this user may not use the socket";
    default:
      return std::strerror(failed);
  }
}

// What may be wrong with TLS, by what gRPC says; empty: nothing that one can see.
std::string TlsHint(const GlobalOptions& options, absl::string_view reason) {
  const client::Security& security = options.security;
  const bool tls = !security.insecure && (security.tls || !security.ca_file.empty() ||
                                          !security.certificate_file.empty());
  // A daemon with TLS hangs up on a client without.
  if (!tls && absl::StrContains(reason, "Socket closed")) {
    return "the daemon may want it: --tls-ca FILE";
  }
  if (absl::StrContains(reason, "Hostname Verification Check failed")) {
    return "the daemon's certificate has another name: --tls-server-name NAME";
  }
  if (tls && absl::StrContains(reason, "wrong version number")) {
    return "the daemon speaks none: leave --tls-ca and the like out";
  }
  if (absl::StrContains(reason, "handshake failed")) {
    return "the daemon's certificate is over, or not signed by who --tls-ca FILE trusts";
  }
  return "";
}

int FailUnreachable(const GlobalOptions& options, const absl::Status& status) {
  const std::string target = TargetOf(options);
  const std::string trouble = SocketTrouble(target);
  // The library's message begins with the target already.
  const absl::string_view reason = absl::StripPrefix(status.message(), absl::StrCat(target, ": "));
  const std::string why = trouble.empty() ? std::string(reason) : trouble;
  const std::string hint = TlsHint(options, reason);
  const std::string start = absl::StrCat("laminad --listen ", target);
  if (options.json) {
    const nlohmann::json error = {{"error",
                                   {{"code", "UNREACHABLE"},
                                    {"message", why},
                                    {"target", target},
                                    {"start", start},
                                    {"exit_code", static_cast<int>(kUnreachable)}}}};
    std::fprintf(stderr, "%s\n", error.dump(2).c_str());
  } else {
    std::fprintf(stderr,
                 "lamina: cannot reach laminad at %s: %s\n"
                 "  start it:      %s\n"
                 "  or name it:    --target unix:PATH or HOST:PORT, or LAMINA_TARGET\n%s",
                 target.c_str(), why.c_str(), start.c_str(),
                 hint.empty() ? "" : absl::StrCat("  or it is TLS:  ", hint, "\n").c_str());
  }
  return kUnreachable;
}

bool MeansUnreachable(absl::StatusCode code) {
  return code == absl::StatusCode::kUnavailable || code == absl::StatusCode::kDeadlineExceeded;
}

}  // namespace

client::ConnectOptions ToConnect(const GlobalOptions& options) {
  return {.call_timeout =
              std::chrono::milliseconds(static_cast<int64_t>(options.timeout_seconds * 1000)),
          .security = options.security};
}

int WithClient(const GlobalOptions& options, const std::function<int(const client::Client&)>& run) {
  const absl::StatusOr<client::Client> made =
      client::Client::Connect(options.target, ToConnect(options));
  if (made.ok()) return run(*made);
  if (made.status().code() == absl::StatusCode::kInvalidArgument) {
    return FailUsage(options, std::string(made.status().message()));
  }
  if (!MeansUnreachable(made.status().code())) return Fail(options, made.status());
  // A daemon that drains refuses calls but is there.
  if (made.status().code() == absl::StatusCode::kUnavailable &&
      client::CheckHealth(options.target, ToConnect(options)).ok()) {
    return Fail(options, made.status());
  }
  return FailUnreachable(options, made.status());
}

int Info(const GlobalOptions& options) {
  return WithClient(options, [&](const client::Client& daemon) {
    const absl::StatusOr<client::ServerInfo> info = daemon.Info();
    if (!info.ok()) return Fail(options, info.status());
    if (options.json) {
      nlohmann::json json = ToJson(*info);
      json["target"] = daemon.target();
      PrintJson(json);
      return static_cast<int>(kOk);
    }
    std::string transports;
    for (const client::Transport transport : info->transports) {
      absl::StrAppend(&transports, transports.empty() ? "" : ", ", client::Name(transport));
    }
    PrintText(
        Lines({{"daemon",
                absl::StrCat("laminad ", info->version,
                             info->build_commit.empty() ? "" : ", commit ", info->build_commit)},
               {"target", daemon.target()},
               {"backend", info->backend},
               {"device", absl::StrCat(info->device_name, info->device_uuid.empty() ? "" : ", ",
                                       info->device_uuid)},
               {"memory", absl::StrCat(HumanBytes(info->device_free_bytes), " free of ",
                                       HumanBytes(info->device_total_bytes))},
               {"transports", transports},
               {"inline cap", HumanBytes(info->inline_cap_bytes)},
               {"checkpoints", info->checkpoints_enabled ? "enabled" : "disabled"},
               {"metrics", info->metrics_address.empty()
                               ? "none"
                               : absl::StrCat("http://", info->metrics_address, "/metrics")},
               {"uptime", HumanSeconds(info->uptime_seconds)}}));
    return static_cast<int>(kOk);
  });
}

int Health(const GlobalOptions& options) {
  const absl::StatusOr<client::Health> health =
      client::CheckHealth(options.target, ToConnect(options));
  if (!health.ok()) {
    if (health.status().code() == absl::StatusCode::kInvalidArgument) {
      return FailUsage(options, std::string(health.status().message()));
    }
    return MeansUnreachable(health.status().code()) ? FailUnreachable(options, health.status())
                                                    : Fail(options, health.status());
  }
  if (options.json) {
    PrintJson(nlohmann::json{{"status", client::Name(*health)}, {"target", TargetOf(options)}});
  } else {
    PrintText(client::Name(*health));
  }
  return *health == client::Health::kServing ? kOk : kRefused;
}

int SaveCheckpoint(const GlobalOptions& options, const std::string& stack,
                   const std::string& name) {
  return WithClient(options, [&](const client::Client& daemon) {
    const absl::StatusOr<client::SavedCheckpoint> saved = daemon.SaveCheckpoint(stack, name);
    if (!saved.ok()) return Fail(options, saved.status());
    if (options.json) {
      PrintJson(
          nlohmann::json{{"path", saved->path}, {"bytes", saved->bytes}, {"step", saved->step}});
    } else {
      PrintText(absl::StrCat("saved '", stack, "' after ", HumanCount(saved->step), " steps to ",
                             saved->path, " (", HumanBytes(saved->bytes),
                             ") on the daemon's host"));
    }
    return static_cast<int>(kOk);
  });
}

int LoadCheckpoint(const GlobalOptions& options, const std::string& stack, const std::string& name,
                   bool create) {
  return WithClient(options, [&](const client::Client& daemon) {
    const absl::StatusOr<client::StackInfo> loaded = daemon.LoadCheckpoint(stack, name, create);
    if (!loaded.ok()) return Fail(options, loaded.status());
    if (options.json) {
      PrintJson(ToJson(*loaded));
    } else {
      PrintText(StackText(*loaded));
    }
    return static_cast<int>(kOk);
  });
}

}  // namespace lamina::cli
