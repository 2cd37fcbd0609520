// The daemon's settings: flags, each with an environment variable LAMINA_*.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace lamina {

struct Flags {
  std::vector<std::string> listen;  // "unix:PATH" or "HOST:PORT"
  std::string broker;               // empty: beside the first Unix socket; "none": no broker
  std::string metrics;              // "HOST:PORT"; empty: none
  std::string device;               // "auto", "cpu", "cuda:N"
  int threads = 0;                  // CPU worker threads, 0: one a core, OMP_NUM_THREADS at most
  std::string checkpoints;          // folder; empty: no checkpoints
  bool final_checkpoint = false;
  uint64_t inline_cap_bytes = 0;
  int queue_capacity = 0;
  int64_t session_cap = 0;
  int64_t region_cap = 0;
  uint64_t region_cap_bytes = 0;
  uint64_t total_region_cap_bytes = 0;
  uint64_t device_region_cap_bytes = 0;
  uint64_t total_device_region_cap_bytes = 0;
  double lease_seconds = 0;
  double resume_grace_cap_seconds = 0;
  double drain_seconds = 0;
  std::vector<uid_t> allow_uids;
  std::string tls_cert, tls_key, tls_client_ca;  // files; all empty: no TLS
  std::string tokens, roles;                     // files; empty: none
  bool metrics_token = false;                    // the metrics port needs one of the tokens
  bool insecure = false;
  bool channelz = false;
  std::string log_level;
  std::string log_format;  // "text", "json"
  std::string profile;     // file or folder for traces of the last steps; empty: none
  int profile_steps = 0;   // how many these are, and the status page's log of steps
  // Every setting by its flag's name ("listen"), as text, whoever gave it.
  std::vector<std::pair<std::string, std::string>> all;
};

// How the process ends; docs/operations.md and --help have the same table.
enum ExitCode : int {
  kStopped = 0,        // in order
  kFailed = 1,         // while it ran, or draining
  kWrongFlags = 2,     // the command line or the environment
  kCantListen = 3,     // an address, a socket
  kBadAccessFile = 4,  // a certificate, key, tokens or roles file
  kNoFolder = 5,       // the folder for checkpoints or profiles: missing, not writable, full
  kNoDevice = 6,       // the device that was asked for
};

// Parses the command line; the environment stands behind it. On --help, --version or a mistake it
// has printed what there is to say and gives the exit code in `exit_code`.
std::optional<Flags> ParseFlags(int argc, char** argv, const std::string& version, int* exit_code);

}  // namespace lamina
