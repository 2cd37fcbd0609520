// The C++ client of laminad.
//
//   Client client = Client::Connect().value();
//   Session session = client.OpenSession().value();
//   Stack stack = session.CreateStack("bert", {.batch_size = 8, ...}).value();
//   Tensor x = session.NewTensor(DType::kFloat32, {8, 128, 256}).value();
//   ForwardResult forward = stack.Forward(x).value();
//
// A Client is a connection and what needs no session: descriptions, plans, making and deleting
// stacks, checkpoints, health. Training needs a Session (session.h), which gives Stack handles
// (stack.h) and Tensors (tensor.h) in memory that the daemon shares.
//
// Nothing here throws; every failure is an absl::Status that carries the daemon's code and message.
// UNAVAILABLE: the daemon cannot be reached or drains. DEADLINE_EXCEEDED: call_timeout passed.
// UNAUTHENTICATED: it does not know who calls. PERMISSION_DENIED: it does, and refuses.
// The library needs the CMake package `lamina` (target lamina::client) and C++20.
#pragma once

#include <chrono>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "lamina/client/pipeline.h"
#include "lamina/client/session.h"
#include "lamina/client/stack.h"
#include "lamina/client/tensor.h"
#include "lamina/client/types.h"

namespace lamina::client {

namespace internal {
class Connection;
}

// How a client over TCP knows its daemon, and how the daemon knows the client. Over a Unix socket
// nothing of it is used: there the daemon knows callers by their user. Files are PEM, and are read
// again when they change: a certificate counts from the next connection on, a token from the next
// call.
struct Security {
  bool tls = false;              // TLS with the system's authorities; the next four imply it
  std::string ca_file;           // who may have signed the daemon's certificate
  std::string certificate_file;  // the client's own certificate, with its chain ...
  std::string key_file;          // ... and its private key
  std::string server_name;       // in the daemon's certificate; empty: the target's host
  std::string token;             // a bearer token
  std::string token_file;        // or a file that holds one and nothing else
  // No TLS whatever the others say, and a token unencrypted also to another host.
  bool insecure = false;

  // LAMINA_TLS (1: the system's authorities), LAMINA_TLS_CA, LAMINA_CLIENT_CERT, LAMINA_CLIENT_KEY,
  // LAMINA_TLS_SERVER_NAME, LAMINA_TOKEN_FILE.
  static Security FromEnvironment();
};

struct ConnectOptions {
  std::chrono::milliseconds connect_timeout{0};  // keep trying for this long; 0: one try
  std::chrono::milliseconds call_timeout{0};     // of each call; 0: none
  std::optional<Security> security = {};         // absent: Security::FromEnvironment()
};

// What the daemon's log calls the call that ended so; empty where the daemon did not answer.
std::string RequestIdOf(const absl::Status& status);

// The environment's LAMINA_TARGET; else the socket where laminad listens by default: in /run/lamina
// for root, in $XDG_RUNTIME_DIR/lamina for others (in /tmp/lamina-UID where that is not set).
std::string DefaultTarget();

// The health service's answer for the daemon as a whole; `target` as Client::Connect's. Needs no
// Client, because a daemon that drains still answers this.
absl::StatusOr<Health> CheckHealth(const std::string& target = "",
                                   const ConnectOptions& options = {});

// Threads: all methods from any thread. A handle: copies share the connection.
class Client {
 public:
  // `target` is "unix:PATH", "HOST:PORT" or an absolute path; empty: DefaultTarget(). Asks the
  // daemon who it is. UNAVAILABLE names the target that was tried. INVALID_ARGUMENT: the target, or
  // options.security.
  static absl::StatusOr<Client> Connect(const std::string& target = "",
                                        const ConnectOptions& options = {});

  const std::string& target() const;
  // As the daemon is now: uptime and free memory change.
  absl::StatusOr<ServerInfo> Info() const;

  absl::StatusOr<Session> OpenSession(const SessionOptions& options = {}) const;

  // --- stacks ---
  // INVALID_ARGUMENT: the name or a field of the config, with its value and range. ALREADY_EXISTS:
  // the name. RESOURCE_EXHAUSTED: the plan does not fit; says what it needs and what is free.
  absl::StatusOr<StackInfo> CreateStack(const std::string& name, const StackConfig& config) const;
  absl::StatusOr<StackInfo> GetStack(const std::string& name) const;  // NOT_FOUND
  absl::StatusOr<std::vector<StackInfo>> ListStacks() const;          // by name
  // All or none. INVALID_ARGUMENT: a ratio, or nothing to change. FAILED_PRECONDITION: training
  // goes off, or a memory flag changes, while contexts are outstanding. RESOURCE_EXHAUSTED: the new
  // plan does not fit. NOT_FOUND.
  absl::StatusOr<StackInfo> UpdateStack(const std::string& name, const StackUpdate& update) const;
  absl::Status DeleteStack(const std::string& name) const;  // NOT_FOUND
  // What the config would allocate; allocates nothing. Errors as CreateStack.
  absl::StatusOr<PlanResult> PlanMemory(const StackConfig& config) const;

  // --- checkpoints; `name` of the file without ending, empty: the stack's ---
  // FAILED_PRECONDITION: the daemon has no checkpoint folder. NOT_FOUND: the stack.
  // RESOURCE_EXHAUSTED: no space.
  absl::StatusOr<SavedCheckpoint> SaveCheckpoint(const std::string& stack,
                                                 const std::string& name = "") const;
  // Into a stack of the same shape; with `create`, as a new stack. NOT_FOUND: the file, or the
  // stack without create. ALREADY_EXISTS: the stack with create. DATA_LOSS: the file is damaged.
  absl::StatusOr<StackInfo> LoadCheckpoint(const std::string& stack, const std::string& name = "",
                                           bool create = false) const;

 private:
  explicit Client(std::shared_ptr<internal::Connection> connection);
  std::shared_ptr<internal::Connection> connection_;
};

}  // namespace lamina::client
