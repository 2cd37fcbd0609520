// A Unix socket for gRPC that knows who connects: it accepts, asks the kernel for the other end's
// user (SO_PEERCRED), which gRPC's own listener does not tell, and hands the connection to gRPC
// with that user's credentials. docs/security.md says why.
//
// Threads: one of its own accepts; all else from one thread.
#pragma once

#include <grpcpp/server_builder.h>
#include <sys/types.h>

#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/statusor.h"
#include "server/service/admission.h"

namespace lamina {

class UnixListener {
 public:
  // Binds and listens; connections wait until Start. The socket's mode is 0600, or 0666 where UIDs
  // besides the daemon's own are let in. Before the server is built. UNAVAILABLE,
  // INVALID_ARGUMENT: as PrepareSocketPath, or the system's word.
  static absl::StatusOr<std::unique_ptr<UnixListener>> Bind(const std::string& path,
                                                            const std::vector<uid_t>& allowed_uids,
                                                            Admission& admission,
                                                            grpc::ServerBuilder& builder);
  ~UnixListener();  // stops accepting, removes the socket

  void Start();  // once the server runs

 private:
  using Acceptor = grpc::experimental::ExternalConnectionAcceptor;
  explicit UnixListener(std::string path) : path_(std::move(path)) {}
  void Serve();

  const std::string path_;
  std::map<uid_t, std::unique_ptr<Acceptor>> acceptors_;
  std::unique_ptr<Acceptor> stranger_;  // for everybody else: hears why it is denied
  int listener_ = -1;
  int wake_ = -1;
  std::thread thread_;
};

}  // namespace lamina
