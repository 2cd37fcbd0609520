#include "server/flags.h"

#include <arpa/inet.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <iostream>
#include <system_error>

#include <CLI/CLI.hpp>

namespace lamina {
namespace {

// /run/lamina for root, the user's own runtime folder else.
std::string DefaultSocket() {
  if (geteuid() == 0) return "/run/lamina/laminad.sock";
  if (const char* runtime = std::getenv("XDG_RUNTIME_DIR");
      runtime != nullptr && *runtime != '\0') {
    return std::string(runtime) + "/lamina/laminad.sock";
  }
  return "/tmp/lamina-" + std::to_string(geteuid()) + "/laminad.sock";
}

// Of numbers, not of a name that begins like one.
bool IsLoopback(const std::string& host) {
  in_addr number{};
  if (inet_pton(AF_INET, host.c_str(), &number) == 1) return (ntohl(number.s_addr) >> 24) == 127;
  return host == "localhost" || host == "[::1]";
}

// Empty, or what is wrong with a --listen.
std::string Complaint(const std::string& address, bool insecure) {
  if (address.rfind("unix:", 0) == 0) {
    return address.size() > 5 ? "" : "--listen " + address + ": needs a path behind unix:";
  }
  const size_t colon = address.rfind(':');
  if (colon == std::string::npos || colon == 0 || colon + 1 == address.size() ||
      address.find_first_not_of("0123456789", colon + 1) != std::string::npos ||
      address.size() - colon > 6 || std::stol(address.substr(colon + 1)) > 65535) {
    return "--listen " + address + ": must be unix:PATH or HOST:PORT with a port of 0 to 65535";
  }
  if (!insecure && !IsLoopback(address.substr(0, colon))) {
    return "--listen " + address +
           ": would serve everybody who can reach it, unencrypted; give --insecure if that is "
           "meant";
  }
  return "";
}

// Empty, or why a --profile can't be written.
std::string ProfileComplaint(const std::string& path) {
  if (path.empty()) return "";
  std::error_code error;
  std::filesystem::path folder = path;
  if (!std::filesystem::is_directory(folder, error)) {
    folder = folder.parent_path().empty() ? "." : folder.parent_path();
    if (!std::filesystem::is_directory(folder, error))
      return "--profile " + path + ": there is no folder " + folder.string();
  }
  // Permissions do not say all: a file is made there.
  std::string draft = (folder / ".laminad-XXXXXX").string();
  const int fd = mkstemp(draft.data());
  if (fd < 0)
    return "--profile " + path + ": the folder " + folder.string() +
           " can't be written to: " + std::strerror(errno);
  close(fd);
  unlink(draft.c_str());
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
      "second signal "
      "stops it at once.\n"
      "Exit codes: 0 stopped in order, 1 could not start or drain, 2 a mistake on the command "
      "line."};
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
      ->envname("LAMINA_CHECKPOINTS")
      ->check(CLI::ExistingDirectory);
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
         "Another user (number) whose processes may map regions; repeatable. The broker's "
         "folder must let them in; they call over TCP, as the gRPC socket stays the daemon's "
         "user's")
      ->envname("LAMINA_ALLOW_UID")
      ->delimiter(',');
  app.add_flag("--insecure", f.insecure,
               "Allow TCP addresses other than loopback: no encryption, no authentication")
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
    *exit_code = app.exit(error) == 0 ? 0 : 2;
    return std::nullopt;
  }
  std::string complaint;
  for (const std::string& address : f.listen) {
    if (complaint.empty()) complaint = Complaint(address, f.insecure);
  }
  if (f.final_checkpoint && f.checkpoints.empty()) {
    complaint = "--final-checkpoint: needs --checkpoints DIR";
  }
  if (complaint.empty()) complaint = ProfileComplaint(f.profile);
  if (!complaint.empty()) {
    std::cerr << complaint << "\nRun with --help for more information.\n";
    *exit_code = 2;
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
