#include "server/flags.h"

#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <iostream>
#include <optional>

#include <CLI/CLI.hpp>

#include "server/tcp_address.h"

namespace lamina {
namespace {

constexpr const char* kFooter = R"(Exit codes:
  0  stopped in order
  1  could not drain or save in order, or failed while it ran
  2  wrong flags
  3  can't listen
  4  a certificate, key, tokens or roles file is wrong
  5  the folder for checkpoints or profiles can't be used
  6  the device can't be used
From 2 on: one line on standard error says why, and nothing has listened.)";

// /run/lamina for root, the user's own runtime folder else.
std::string DefaultSocket() {
  if (geteuid() == 0) return "/run/lamina/laminad.sock";
  if (const char* runtime = std::getenv("XDG_RUNTIME_DIR");
      runtime != nullptr && *runtime != '\0') {
    return std::string(runtime) + "/lamina/laminad.sock";
  }
  return "/tmp/lamina-" + std::to_string(geteuid()) + "/laminad.sock";
}

// Empty, or what is wrong with a --listen.
std::string Complaint(const std::string& address, const Flags& f) {
  if (address.rfind("unix:", 0) == 0) {
    return address.size() > 5 ? "" : "--listen " + address + ": needs a path behind unix:";
  }
  const std::optional<TcpAddress> tcp = ParseTcpAddress(address);
  if (!tcp) {
    return "--listen " + address + ": must be unix:PATH or HOST:PORT with a port of 0 to 65535";
  }
  if (f.insecure || tcp->IsLoopback()) return "";
  if (f.tls_cert.empty()) {
    return "--listen " + address +
           ": would serve everybody who can reach it, unencrypted; give --tls-cert and --tls-key, "
           "or --insecure if that is meant";
  }
  if (f.tls_client_ca.empty() && f.tokens.empty()) {
    return "--listen " + address +
           ": would serve everybody who can reach it; give --tls-client-ca or --tokens, which say "
           "who may call, or --insecure if that is meant";
  }
  return "";
}

// Empty, or what is wrong with flags that go together.
std::string Complaint(const Flags& f) {
  for (const std::string& address : f.listen) {
    if (std::string complaint = Complaint(address, f); !complaint.empty()) return complaint;
  }
  if (f.metrics != "none" && !ParseTcpAddress(f.metrics)) {
    return "--metrics " + f.metrics + ": must be none or HOST:PORT with a port of 0 to 65535";
  }
  if (f.device != "auto" && f.device != "cpu" &&
      (f.device.rfind("cuda:", 0) != 0 || f.device.size() == 5 || f.device.size() > 8 ||
       f.device.find_first_not_of("0123456789", 5) != std::string::npos)) {
    return "--device " + f.device + ": must be auto, cpu or cuda:N";
  }
  // The kernel's word for nobody.
  if (std::find(f.allow_uids.begin(), f.allow_uids.end(), static_cast<uid_t>(-1)) !=
      f.allow_uids.end()) {
    return "--allow-uid " + std::to_string(static_cast<uid_t>(-1)) + ": is no user";
  }
  if (f.tls_cert.empty() != f.tls_key.empty()) {
    return f.tls_key.empty() ? "--tls-cert: needs --tls-key FILE"
                             : "--tls-key: needs --tls-cert FILE";
  }
  if (!f.tls_client_ca.empty() && f.tls_cert.empty()) {
    return "--tls-client-ca: needs --tls-cert FILE and --tls-key FILE";
  }
  if (f.metrics_token && f.tokens.empty()) return "--metrics-token: needs --tokens FILE";
  if (f.final_checkpoint && f.checkpoints.empty()) {
    return "--final-checkpoint: needs --checkpoints DIR";
  }
  return "";
}

// What each option came to: as given, on the command line or by the environment, or its default.
std::vector<std::pair<std::string, std::string>> AllSettings(const CLI::App& app) {
  std::vector<std::pair<std::string, std::string>> settings;
  for (const CLI::Option* option : app.get_options()) {
    const std::vector<std::string>& names = option->get_lnames();
    if (names.empty() || names.front() == "help" || names.front() == "version") continue;
    std::string value = option->get_default_str();
    if (option->count() > 0) {
      value.clear();
      for (const std::string& result : option->reduced_results())
        value += (value.empty() ? "" : ",") + result;
    } else if (option->get_expected_max() == 0) {
      value = "false";  // a flag
    }
    settings.emplace_back(names.front(), value);
  }
  return settings;
}

}  // namespace

std::optional<Flags> ParseFlags(int argc, char** argv, const std::string& version, int* exit_code) {
  Flags f;
  CLI::App app{
      "laminad: owns transformer layer stacks in one device's memory and serves them over gRPC.\n"
      "Stops on SIGTERM or SIGINT: refuses new calls, finishes running ones, exits with 0; a "
      "second signal stops it at once."};
  app.footer(kFooter);
  app.set_version_flag("--version", "laminad " + version);
  app.get_formatter()->column_width(34);

  f.listen = {"unix:" + DefaultSocket()};
  app.add_option("--listen", f.listen,
                 "Address to serve on, unix:PATH or HOST:PORT (port 0: any free one); repeatable")
      ->envname("LAMINA_LISTEN")
      ->delimiter(',')
      ->take_all()
      ->capture_default_str();
  app.add_option("--broker", f.broker,
                 "Unix socket that hands out regions' descriptors; default: broker.sock beside the "
                 "first Unix socket; "
                 "'none': no regions")
      ->envname("LAMINA_BROKER");
  f.metrics = "127.0.0.1:9464";
  app.add_option("--metrics", f.metrics,
                 "HOST:PORT of the metrics (port 0: any free one); 'none': none")
      ->envname("LAMINA_METRICS")
      ->capture_default_str();
  f.device = "auto";
  app.add_option("--device", f.device, "auto (a GPU if there is one), cpu, or cuda:N")
      ->envname("LAMINA_DEVICE")
      ->capture_default_str();
  app.add_option("--threads", f.threads,
                 "Worker threads of the CPU backend; 0: one a core, OMP_NUM_THREADS at most")
      ->envname("LAMINA_THREADS")
      ->check(CLI::Range(0, 4096))
      ->capture_default_str();
  app.add_option("--checkpoints", f.checkpoints,
                 "Folder for checkpoints; without it they are refused")
      ->envname("LAMINA_CHECKPOINTS");
  app.add_flag("--final-checkpoint", f.final_checkpoint,
               "Save every stack under its name when stopped by a signal")
      ->envname("LAMINA_FINAL_CHECKPOINT");
  f.inline_cap_bytes = uint64_t{16} << 20;
  app.add_option("--inline-cap", f.inline_cap_bytes, "Largest tensor inside a message, bytes")
      ->envname("LAMINA_INLINE_CAP")
      ->check(CLI::Range(uint64_t{1024}, uint64_t{1} << 30))
      ->transform(CLI::AsSizeValue(false))
      ->capture_default_str();
  f.queue_capacity = 256;
  app.add_option("--queue-capacity", f.queue_capacity, "Calls that may wait for the device")
      ->envname("LAMINA_QUEUE_CAPACITY")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  f.session_cap = 1024;
  app.add_option("--session-cap", f.session_cap, "Sessions at a time")
      ->envname("LAMINA_SESSION_CAP")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 20))
      ->capture_default_str();
  f.region_cap = 256;
  app.add_option("--region-cap", f.region_cap, "Regions a session")
      ->envname("LAMINA_REGION_CAP")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 20))
      ->capture_default_str();
  f.region_cap_bytes = uint64_t{8} << 30;
  app.add_option("--region-cap-bytes", f.region_cap_bytes, "Bytes of a session's regions together")
      ->envname("LAMINA_REGION_CAP_BYTES")
      ->transform(CLI::AsSizeValue(false))
      ->capture_default_str();
  f.total_region_cap_bytes = uint64_t{32} << 30;
  app.add_option("--total-region-cap-bytes", f.total_region_cap_bytes,
                 "Bytes of all sessions' regions together")
      ->envname("LAMINA_TOTAL_REGION_CAP_BYTES")
      ->transform(CLI::AsSizeValue(false))
      ->capture_default_str();
  f.device_region_cap_bytes = uint64_t{4} << 30;
  app.add_option("--device-region-cap-bytes", f.device_region_cap_bytes,
                 "Bytes of a session's regions in device memory together; 0: there are none")
      ->envname("LAMINA_DEVICE_REGION_CAP_BYTES")
      ->transform(CLI::AsSizeValue(false))
      ->capture_default_str();
  f.total_device_region_cap_bytes = uint64_t{8} << 30;
  app.add_option("--total-device-region-cap-bytes", f.total_device_region_cap_bytes,
                 "Bytes of all sessions' regions in device memory together: what stacks may be "
                 "short of; 0: there are none")
      ->envname("LAMINA_TOTAL_DEVICE_REGION_CAP_BYTES")
      ->transform(CLI::AsSizeValue(false))
      ->capture_default_str();
  f.lease_seconds = 30;
  app.add_option("--lease", f.lease_seconds, "Longest silence of a session, seconds")
      ->envname("LAMINA_LEASE")
      ->check(CLI::Range(0.1, 86400.0))
      ->capture_default_str();
  f.resume_grace_cap_seconds = 60;
  app.add_option("--resume-grace-cap", f.resume_grace_cap_seconds,
                 "Longest time that a session whose KeepAlive stream broke waits to be resumed, "
                 "seconds; sessions ask for theirs; 0: none waits")
      ->envname("LAMINA_RESUME_GRACE_CAP")
      ->check(CLI::Range(0.0, 86400.0))
      ->capture_default_str();
  f.drain_seconds = 30;
  app.add_option("--drain-timeout", f.drain_seconds,
                 "Longest wait for running calls when stopped, seconds")
      ->envname("LAMINA_DRAIN_TIMEOUT")
      ->check(CLI::Range(0.0, 86400.0))
      ->capture_default_str();
  app.add_option(
         "--allow-uid", f.allow_uids,
         "Another user (number) whose processes may use the Unix sockets; repeatable. The sockets' "
         "folder must let them in")
      ->envname("LAMINA_ALLOW_UID")
      ->delimiter(',');
  app.add_option("--tls-cert", f.tls_cert,
                 "The daemon's certificate, and those between it and the root; PEM. TCP addresses "
                 "speak TLS alone then")
      ->envname("LAMINA_TLS_CERT")
      ->type_name("FILE");
  app.add_option("--tls-key", f.tls_key, "Its private key; PEM, for the daemon's user alone")
      ->envname("LAMINA_TLS_KEY")
      ->type_name("FILE");
  app.add_option("--tls-client-ca", f.tls_client_ca,
                 "Who signs the certificates that clients over TCP must show (may, with --tokens); "
                 "PEM")
      ->envname("LAMINA_TLS_CLIENT_CA")
      ->type_name("FILE");
  app.add_option("--tokens", f.tokens,
                 "Bearer tokens of clients over TCP, a line each: TOKEN or NAME TOKEN")
      ->envname("LAMINA_TOKENS")
      ->type_name("FILE");
  app.add_option("--roles", f.roles,
                 "Who may do what, a line each: IDENTITY ROLE[,ROLE]; without it, all who are "
                 "known may do all. These five files are read again when they change; "
                 "docs/security.md has their form")
      ->envname("LAMINA_ROLES")
      ->type_name("FILE");
  app.add_flag(
         "--metrics-token", f.metrics_token,
         "The metrics port too needs one of --tokens, with any role; not /healthz and /readyz")
      ->envname("LAMINA_METRICS_TOKEN");
  app.add_flag("--insecure", f.insecure,
               "Allow TCP addresses other than loopback without encryption, or without asking who "
               "calls")
      ->envname("LAMINA_INSECURE");
  app.add_flag("--channelz", f.channelz, "Serve gRPC's own channelz service")
      ->envname("LAMINA_CHANNELZ");
  f.log_level = "info";
  app.add_option("--log-level", f.log_level, "trace, debug, info, warning, error or off")
      ->envname("LAMINA_LOG_LEVEL")
      ->check(CLI::IsMember({"trace", "debug", "info", "warning", "error", "off"}))
      ->capture_default_str();
  f.log_format = "text";
  app.add_option("--log-format", f.log_format, "text or json, a line an event, on standard error")
      ->envname("LAMINA_LOG_FORMAT")
      ->check(CLI::IsMember({"text", "json"}))
      ->capture_default_str();
  app.add_option("--profile", f.profile,
                 "File or folder: on SIGUSR1 and at the end, a trace of the last steps is written "
                 "there, for Perfetto or chrome://tracing")
      ->envname("LAMINA_PROFILE");
  f.profile_steps = 1024;
  app.add_option("--profile-steps", f.profile_steps,
                 "How many steps that are; each takes 280 bytes")
      ->envname("LAMINA_PROFILE_STEPS")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();

  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == 0) {  // --help, --version
      *exit_code = app.exit(error);
    } else {
      std::cerr << "laminad: " << error.what() << " (--help lists the flags)\n";
      *exit_code = kWrongFlags;
    }
    return std::nullopt;
  }
  if (const std::string complaint = Complaint(f); !complaint.empty()) {
    std::cerr << "laminad: " << complaint << " (--help lists the flags)\n";
    *exit_code = kWrongFlags;
    return std::nullopt;
  }
  f.all = AllSettings(app);
  if (f.metrics == "none") f.metrics.clear();
  if (f.broker.empty()) {
    for (const std::string& address : f.listen) {
      if (address.rfind("unix:", 0) != 0) continue;
      const std::string path = address.substr(5);
      f.broker = path.substr(0, path.rfind('/') + 1) + "broker.sock";
      break;
    }
  }
  if (f.broker == "none") f.broker.clear();
  // Clients are told it, and have working folders of their own.
  if (!f.broker.empty()) f.broker = std::filesystem::absolute(f.broker).string();
  return f;
}

}  // namespace lamina
