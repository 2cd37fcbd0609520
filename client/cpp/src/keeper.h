// Holds a session's lease: two threads on the KeepAlive stream, one writes, one reads. Internal.
#pragma once

#include <chrono>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace lamina::client::internal {

class Connection;

class Keeper {
 public:
  struct Args {
    std::shared_ptr<Connection> connection;
    std::string session_id;
    std::chrono::duration<double> lease;         // a message goes out every third of it
    std::chrono::milliseconds start_timeout{0};  // for the first answer; 0: none
  };
  // Returns once the daemon has answered the first message: the lease is bound to the stream then.
  // Fails with the stream's status, or DEADLINE_EXCEEDED.
  static absl::StatusOr<std::unique_ptr<Keeper>> Start(Args args);
  // Ends the stream, and with it the session; joins the threads.
  virtual ~Keeper() = default;
  // OK while the stream stands; else how it ended. Any thread.
  virtual absl::Status status() const = 0;
};

}  // namespace lamina::client::internal
