// The broker: the Unix socket over which clients get the descriptors of their regions. gRPC passes
// none. docs/broker.md describes the wire.
//
// Threads: one of its own serves all connections; Start and the destructor from one thread.
#pragma once

#include <sys/types.h>

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "server/session/session_manager.h"

namespace lamina {

struct BrokerOptions {
  std::string path;  // the socket; its folder is made with mode 0700 if it is missing
  std::vector<uid_t> allowed_uids;  // besides the daemon's own
  int connection_cap = 256;         // more wait in the backlog
  absl::Duration idle_timeout = absl::Seconds(10);
};

class Broker {
 public:
  // `sessions` outlives the broker. UNAVAILABLE where another process listens on the path;
  // INVALID_ARGUMENT for a path that is too long or is no socket.
  static absl::StatusOr<std::unique_ptr<Broker>> Start(BrokerOptions options,
                                                       SessionManager& sessions);
  virtual ~Broker() = default;  // closes all connections and removes the socket
};

}  // namespace lamina
