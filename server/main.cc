// laminad: wires the rooms together, waits for a signal, takes them down in order.
#include <malloc.h>
#include <pthread.h>
#include <signal.h>
#include <spdlog/spdlog.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/synchronization/mutex.h"
#include "lamina/kernels/backend.h"
#include "server/access/access.h"
#include "server/access/tls_files.h"
#include "server/engine/engine.h"
#include "server/flags.h"
#include "server/logging.h"
#include "server/metrics/exposer.h"
#include "server/metrics/metrics.h"
#include "server/service/callback_threads.h"
#include "server/service/device_memory.h"
#include "server/service/grpc_log.h"
#include "server/service/grpc_server.h"
#include "server/service/shared_state.h"
#include "server/session/broker.h"
#include "server/session/session_manager.h"
#include "server/start_checks.h"
#include "server/status/status_pages.h"
#include "server/status/step_trace.h"

namespace lamina {
namespace {

// The one line of a daemon that does not start, also where the log is off.
int Fail(ExitCode code, const absl::Status& status) {
  if (spdlog::should_log(spdlog::level::err)) {
    spdlog::error("event=failed exit_code={} reason={}", static_cast<int>(code),
                  Quoted(status.message()));
  } else {
    std::fprintf(stderr, "laminad: %s\n", std::string(status.message()).c_str());
  }
  return code;
}

absl::StatusOr<std::unique_ptr<Backend>> OpenDevice(const Flags& flags) {
  if (flags.device != "auto") return Backend::Create(flags.device, flags.threads);
  auto gpu = Backend::Create("cuda:0");
  if (gpu.ok()) return gpu;
  spdlog::info("event=no_gpu reason={} device=cpu", Quoted(gpu.status().message()));
  return Backend::Create("cpu", flags.threads);
}

SessionOptions ToSessionOptions(const Flags& flags) {
  SessionOptions options;
  options.lease = absl::Seconds(flags.lease_seconds);
  options.resume_grace_cap = absl::Seconds(flags.resume_grace_cap_seconds);
  options.session_cap = flags.session_cap;
  options.region_cap = flags.region_cap;
  options.region_cap_bytes = flags.region_cap_bytes;
  options.total_region_cap_bytes = flags.total_region_cap_bytes;
  options.device_region_cap_bytes = flags.device_region_cap_bytes;
  options.total_device_region_cap_bytes = flags.total_device_region_cap_bytes;
  return options;
}

// All that the daemon is going to listen on.
std::vector<std::string> AddressesOf(const Flags& flags) {
  std::vector<std::string> addresses = flags.listen;
  if (!flags.broker.empty()) addresses.push_back("unix:" + flags.broker);
  if (!flags.metrics.empty()) addresses.push_back(flags.metrics);
  return addresses;
}

absl::Status CheckFolders(const Flags& flags) {
  if (!flags.checkpoints.empty()) {
    if (absl::Status status = CheckFolder("--checkpoints " + flags.checkpoints, flags.checkpoints);
        !status.ok()) {
      return status;
    }
  }
  if (flags.profile.empty()) return absl::OkStatus();
  return CheckFolder("--profile " + flags.profile, FolderOfProfile(flags.profile));
}

// What /configz shows.
std::string ConfigJson(const Flags& flags) {
  nlohmann::ordered_json settings = nlohmann::ordered_json::object();
  for (const auto& [name, value] : flags.all) settings[name] = value;
  const nlohmann::ordered_json config = {
      {"version", LAMINA_VERSION}, {"commit", LAMINA_COMMIT}, {"settings", std::move(settings)}};
  return config.dump(1, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
}

// Lets those see pages who have a token with some role. Probes need none.
HttpGuard PageGuard(const Access& access) {
  return [&access](const std::string& path, const std::string& authorization) {
    if (path == "/healthz" || path == "/readyz") return true;
    if (authorization.empty()) return false;
    const auto caller = access.Identify({.authorization = {authorization}});
    return caller.ok() && caller->roles != kNoRole;
  };
}

void WriteProfile(const MetricSet& metrics, const Flags& flags) {
  if (flags.profile.empty()) {
    spdlog::warn("event=no_profile reason=\"SIGUSR1 writes one where --profile says where to\"");
    return;
  }
  const auto written =
      WriteStepTrace(metrics.steps(), flags.profile, absl::StrCat("laminad ", getpid()));
  if (written.ok()) {
    spdlog::info("event=profile_written path={} steps={}", Quoted(*written),
                 std::min<uint64_t>(metrics.steps().total(), metrics.steps().capacity()));
  } else {
    spdlog::error("event=profile_failed reason={}", Quoted(written.status().message()));
  }
}

// Signals are taken here alone: main blocked them before any thread began. Calls `look` about four
// times a second meanwhile, and `profile` on each SIGUSR1.
void WaitForStop(const sigset_t& signals, const std::function<void()>& look,
                 const std::function<void()>& profile) {
  int signal = -1;
  while (signal < 0) {
    const timespec pause{.tv_sec = 0, .tv_nsec = 250'000'000};
    signal = sigtimedwait(&signals, nullptr, &pause);
    look();
    if (signal == SIGUSR1) {
      profile();
      signal = -1;
    }
  }
  spdlog::info("event=draining signal={}", signal == SIGINT ? "SIGINT" : "SIGTERM");
  std::thread([signals] {
    int again = SIGUSR1;
    while (again == SIGUSR1) sigwait(&signals, &again);
    spdlog::warn("event=stopped_at_once");
    _exit(1);
  }).detach();
}

// Saves every stack; false where one failed.
bool SaveAll(Engine& engine) {
  bool saved_all = true;
  for (const StackInfo& stack : engine.ListStacks()) {
    const auto saved = engine.SaveCheckpoint(stack.name, stack.name, CallControl{});
    if (saved.ok()) {
      spdlog::info("event=checkpoint_saved stack={} path={} bytes={} step={}", stack.name,
                   Quoted(saved->path), saved->bytes, saved->step);
    } else {
      spdlog::error("event=checkpoint_failed stack={} reason={}", stack.name,
                    Quoted(saved.status().message()));
      saved_all = false;
    }
  }
  return saved_all;
}

int Run(const Flags& flags, const sigset_t& signals) {
  const absl::Time started = absl::Now();
  auto access = Access::Open({.tokens = flags.tokens,
                              .roles = flags.roles,
                              .client_certificates = !flags.tls_client_ca.empty(),
                              .allowed_uids = flags.allow_uids});
  if (!access.ok()) return Fail(kBadAccessFile, access.status());
  std::unique_ptr<TlsFiles> tls;
  if (!flags.tls_cert.empty()) {
    auto opened = TlsFiles::Open(
        {.certificate = flags.tls_cert, .key = flags.tls_key, .client_ca = flags.tls_client_ca});
    if (!opened.ok()) return Fail(kBadAccessFile, opened.status());
    tls = *std::move(opened);
  }
  if (absl::Status status = CheckFolders(flags); !status.ok()) return Fail(kNoFolder, status);
  if (absl::Status status = CheckAddresses(AddressesOf(flags)); !status.ok()) {
    return Fail(kCantListen, status);
  }
  auto backend = OpenDevice(flags);
  if (!backend.ok()) {
    return Fail(kNoDevice,
                absl::Status(backend.status().code(), absl::StrCat("--device ", flags.device, ": ",
                                                                   backend.status().message())));
  }
  const DeviceInfo device = (*backend)->info();

  MetricSet metrics({.version = LAMINA_VERSION,
                     .commit = LAMINA_COMMIT,
                     .backend = device.kind,
                     .device = device.name,
                     .uuid = device.uuid,
                     .ordinal = device.ordinal},
                    static_cast<size_t>(flags.profile_steps));
  EngineOptions engine_options;
  engine_options.checkpoint_dir = flags.checkpoints;
  engine_options.queue_capacity = flags.queue_capacity;
  engine_options.inline_cap_bytes = flags.inline_cap_bytes;
  engine_options.measure_peak = true;
  auto engine = Engine::Create(*std::move(backend), &metrics, engine_options);
  if (!engine.ok()) return Fail(kFailed, engine.status());

  MutationLogs mutations;
  SessionHooks hooks;
  if (!device.host_memory) {
    hooks.register_host = [&](void* data, size_t bytes) {
      return (*engine)->RegisterHost(data, bytes);
    };
    hooks.unregister_host = [&](void* data) { (*engine)->UnregisterHost(data); };
    hooks.make_device_memory = [&](size_t bytes, RegionKind kind) {
      return MakeDeviceMemory(**engine, bytes, kind);
    };
  }
  hooks.ended = [&](uint64_t key, const std::string& reason) {
    (*engine)->EndSession(key);
    mutations.Forget(key);
    metrics.SessionEnded(reason);
    spdlog::info("event=session_ended session={} reason={}", key, reason);
  };
  const std::unique_ptr<SessionManager> sessions =
      SessionManager::Create(ToSessionOptions(flags), std::move(hooks));
  metrics.SetRefresh([&] {
    metrics.SetSessions(sessions->live_sessions(), sessions->adrift_sessions(),
                        sessions->live_regions(), sessions->region_bytes());
    metrics.SetDeviceRegions(sessions->live_device_regions(), sessions->device_region_bytes());
    const std::map<SessionKey, ContextUse> contexts = (*engine)->ContextUses();
    std::vector<SessionMemory> memory;
    for (const SessionManager::View& session : sessions->List()) {
      const auto use = contexts.find(session.key);
      memory.push_back({.region_bytes = session.region_bytes,
                        .activation_bytes = use == contexts.end() ? 0 : use->second.bytes});
    }
    metrics.SetSessionMemory(std::move(memory));
    metrics.SetDeviceFree((*engine)->device_free_bytes());
  });

  std::unique_ptr<Broker> broker;
  if (!flags.broker.empty()) {
    auto opened =
        Broker::Start({.path = flags.broker, .allowed_uids = flags.allow_uids}, *sessions);
    if (!opened.ok()) return Fail(kCantListen, opened.status());
    broker = *std::move(opened);
  }
  std::atomic<Phase> phase{Phase::kStarting};
  StatusSources status{.engine = **engine,
                       .sessions = *sessions,
                       .metrics = metrics,
                       .phase = phase,
                       .version = LAMINA_VERSION,
                       .commit = LAMINA_COMMIT,
                       .started = started,
                       .broker = flags.broker};
  std::unique_ptr<MetricsExposer> exposer;
  if (!flags.metrics.empty()) {
    auto opened =
        MetricsExposer::Start(flags.metrics, metrics, StatusPages(status, ConfigJson(flags)),
                              flags.metrics_token ? PageGuard(**access) : HttpGuard());
    if (!opened.ok()) return Fail(kCantListen, opened.status());
    exposer = *std::move(opened);
  }
  Gate gate;
  SharedState state{.engine = **engine,
                    .sessions = *sessions,
                    .access = **access,
                    .metrics = metrics,
                    .mutations = mutations,
                    .gate = gate,
                    .broker_path = flags.broker,
                    .metrics_address = exposer == nullptr ? "" : exposer->address(),
                    .version = LAMINA_VERSION,
                    .commit = LAMINA_COMMIT,
                    .started = started};
  auto server = GrpcServer::Start({.listen = flags.listen,
                                   .channelz = flags.channelz,
                                   .tls = tls.get(),
                                   .allowed_uids = flags.allow_uids},
                                  state);
  if (!server.ok()) return Fail(kCantListen, server.status());
  std::optional<HeldCallbackThreads> held(std::in_place, SpareCallbackThreads());
  status.listen = (*server)->addresses();

  (*server)->SetServing(true);
  metrics.SetServing(true);
  phase = Phase::kServing;
  spdlog::info(
      "event=ready version={} commit={} device={}:{} device_name={} threads={} listen={} "
      "broker={} metrics={}",
      LAMINA_VERSION, LAMINA_COMMIT, device.kind, device.ordinal, Quoted(device.name),
      device.threads, absl::StrJoin((*server)->addresses(), ","),
      flags.broker.empty() ? "none" : flags.broker,
      exposer == nullptr ? "none" : exposer->address());

  bool healthy = true;
  const auto look = [&] {
    if (tls != nullptr) tls->Refresh();
    if ((*access)->Refresh()) (*server)->LookAgain();
    const absl::Status health = (*engine)->health();
    if (health.ok() || !healthy) return;
    healthy = false;
    spdlog::error("event=device_failed reason={}", Quoted(health.message()));
    (*server)->SetServing(false);
    metrics.SetServing(false);
  };
  WaitForStop(signals, look, [&] { WriteProfile(metrics, flags); });
  phase = Phase::kDraining;
  const absl::Time deadline = absl::Now() + absl::Seconds(flags.drain_seconds);
  (*server)->SetServing(false);
  metrics.SetServing(false);
  bool in_order = gate.Close(deadline);
  if (!in_order) spdlog::warn("event=drain_timeout");
  if (flags.final_checkpoint) in_order = SaveAll(**engine) && in_order;
  held.reset();
  // The streams that keep sessions never end by themselves.
  (*server)->Shutdown(absl::Now() + absl::Milliseconds(100));
  (*engine)->Drain();
  metrics.SetRefresh(nullptr);
  if (!flags.profile.empty()) WriteProfile(metrics, flags);
  spdlog::info("event=stopped in_order={}", in_order);
  return in_order ? 0 : 1;
}

}  // namespace
}  // namespace lamina

// glibc gives threads arenas of their own, up to eight a core, and each keeps what was freed in it.
// Here threads come with calls, and none of them allocates during a step: two will do.
constexpr int kArenas = 2;

int main(int argc, char** argv) {
  mallopt(M_ARENA_MAX, kArenas);
  // Debian's Abseil looks for cycles whenever gRPC locks something: 4 % of what a call takes.
  absl::SetMutexDeadlockDetectionMode(absl::OnDeadlockCycle::kIgnore);
  int exit_code = 0;
  const auto flags = lamina::ParseFlags(argc, argv, LAMINA_VERSION, &exit_code);
  if (!flags) return exit_code;
  lamina::SetUpLog(flags->log_level, flags->log_format);
  lamina::TakeGrpcLog();
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  sigaddset(&signals, SIGUSR1);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  signal(SIGPIPE, SIG_IGN);
  return lamina::Run(*flags, signals);
}
