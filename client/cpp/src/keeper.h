// Holds a session's lease: two threads on the KeepAlive stream, one writes, one reads. When the
// stream breaks another one is opened, until one is answered or the session's grace is over.
// Internal.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace lamina::client::internal {

class Connection;

// Threads: all methods from any thread.
class Keeper {
 public:
  struct Args {
    std::shared_ptr<Connection> connection;
    std::string session_id;
    std::chrono::duration<double> lease;
    std::chrono::duration<double> grace;         // as the daemon granted it; 0: none
    std::chrono::milliseconds start_timeout{0};  // for the first answer; 0: none
  };
  // Returns once the daemon has answered the first message: the lease is bound to the stream then.
  // Fails with the stream's status, or DEADLINE_EXCEEDED.
  static absl::StatusOr<std::shared_ptr<Keeper>> Start(Args args);
  virtual ~Keeper() = default;  // Stop
  // Ends the stream without a word; joins the threads. Delete the session first.
  virtual void Stop() = 0;
  // OK while a stream stands, or may be mended; else how the last one ended.
  virtual absl::Status status() const = 0;
  // Whether a stream stands, as far as is known here.
  virtual bool held() const = 0;
  // How many streams have ended.
  virtual uint64_t breaks() const = 0;
  // Waits while it is open whether a broken stream can be mended.
  virtual void Settle() const = 0;
};

}  // namespace lamina::client::internal
