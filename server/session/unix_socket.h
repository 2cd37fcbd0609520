// Unix sockets that the daemon listens on: gRPC's and the broker's.
#pragma once

#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace lamina {

// Makes way for a listener on a Unix socket: the folder exists (0700 where it had to be made), and
// a socket that nobody listens on is removed. UNAVAILABLE where somebody does; INVALID_ARGUMENT for
// a path that is too long or something other than a socket.
absl::Status PrepareSocketPath(const std::string& path);

// A listener of this type (SOCK_STREAM, SOCK_SEQPACKET) on the path, which PrepareSocketPath has
// made way for: a descriptor that does not block, the caller's to close. `others`: also users
// besides the daemon's may connect, as far as the folder lets them. Not for two threads at a time:
// it changes the process's umask for a moment. UNAVAILABLE, and what PrepareSocketPath refuses.
absl::StatusOr<int> ListenOnSocket(const std::string& path, int type, int backlog, bool others);

}  // namespace lamina
