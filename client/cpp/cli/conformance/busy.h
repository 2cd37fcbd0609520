// Keeps the device at work for a while, so that a call has to wait for it.
#pragma once

#include <chrono>
#include <condition_variable>
#include <deque>
#include <mutex>

#include "cli/conformance/rig.h"

namespace lamina::conformance {

// Evaluation Forwards of a stack of 1024 very small layers: long on any device, little memory.
// Calls of others come between them as between those of any client.
class Busy {
 public:
  // Makes the stack and learns how long one Forward takes. Skips the check where sessions would not
  // live as long as it may have to wait.
  explicit Busy(Daemon& daemon);
  ~Busy();

  // One such Forward.
  v1::ForwardRequest Forward() const { return rig_.Evaluate(); }
  // How many of them take this long on the device.
  int CountFor(Milliseconds duration) const;
  // Sends as many at once and returns.
  void Start(Milliseconds duration);
  // Waits until all have been answered. Skips the check where one was refused: then the device was
  // not kept busy.
  void Join();

 private:
  struct Call {
    grpc::ClientContext context;
    v1::ForwardRequest request;
    v1::ForwardResponse response;
    grpc::Status status;
  };
  void Wait();

  Rig rig_;
  double seconds_ = 0;  // of one Forward on the device, at least
  std::mutex mutex_;
  std::condition_variable answered_;
  std::deque<Call> calls_;
  size_t waiting_ = 0;  // guarded by mutex_
};

}  // namespace lamina::conformance
