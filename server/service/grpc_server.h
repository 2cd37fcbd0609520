// The gRPC server with all services, health and reflection.
#pragma once

#include <sys/types.h>

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "server/access/tls_files.h"
#include "server/service/shared_state.h"

namespace lamina {

struct GrpcServerOptions {
  std::vector<std::string> listen;  // "unix:PATH" or "HOST:PORT", port 0 for any free one
  bool channelz = false;
  const TlsFiles* tls = nullptr;    // for every TCP address, and outlives the server; null: none
  std::vector<uid_t> allowed_uids;  // besides the daemon's own, on Unix sockets
};

class GrpcServer {
 public:
  // Listens and serves; health says NOT_SERVING until SetServing(true). `state` outlives the
  // server. INVALID_ARGUMENT: an address's form. UNAVAILABLE: one that can't be listened on.
  // INTERNAL: an RPC that the table of roles does not have.
  static absl::StatusOr<std::unique_ptr<GrpcServer>> Start(const GrpcServerOptions& options,
                                                           SharedState& state);
  virtual ~GrpcServer() = default;

  virtual const std::vector<std::string>& addresses() const = 0;  // with the real ports
  virtual void SetServing(bool serving) = 0;
  // Ends the streams whose callers may no longer have them: for when state.access has changed.
  virtual void LookAgain() = 0;
  // Takes no new calls, cancels what still runs at the deadline, returns when all is over.
  virtual void Shutdown(absl::Time deadline) = 0;
};

}  // namespace lamina
