// A channel to a daemon, its stubs, and how unary calls are made on them. Internal.
#pragma once

#include <grpcpp/channel.h>
#include <grpcpp/client_context.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "lamina/client.h"
#include "lamina/v1/config_service.grpc.pb.h"
#include "lamina/v1/layer_service.grpc.pb.h"
#include "lamina/v1/session_service.grpc.pb.h"

namespace lamina::client::internal {

namespace pb = lamina::v1;
using Milliseconds = std::chrono::milliseconds;
using Clock = std::chrono::steady_clock;

// The codes are the same numbers. What gRPC says about a connection that it could not make is
// followed by the target, because a reader needs to know which one.
absl::Status ToAbsl(const grpc::Status& status, const std::string& target);
// The same with the request's id (RequestIdOf) from the call's trailing metadata.
absl::Status ToAbsl(const grpc::Status& status, const grpc::ClientContext& context,
                    const std::string& target);
absl::Status WithRequestId(absl::Status status, const std::string& id);  // empty: as it is

template <class Stub, class Request, class Response>
using Method = grpc::Status (Stub::*)(grpc::ClientContext*, const Request&, Response*);

// Threads: all members from any thread.
class Connection {
 public:
  // Does not connect yet. INVALID_ARGUMENT: the target.
  static absl::StatusOr<std::shared_ptr<Connection>> Create(const std::string& target,
                                                            const ConnectOptions& options);

  pb::ConfigService::Stub& config() { return *config_; }
  pb::LayerService::Stub& layers() { return *layers_; }
  pb::SessionService::Stub& sessions() { return *sessions_; }
  const std::shared_ptr<grpc::Channel>& channel() const { return channel_; }
  const std::string& target() const { return target_; }
  // Whether the target is a Unix socket.
  bool on_this_host() const { return on_this_host_; }
  Milliseconds call_timeout() const { return options_.call_timeout; }
  // Largest inline tensor, as the daemon said at Connect.
  uint64_t inline_cap_bytes() const { return inline_cap_bytes_; }
  void set_inline_cap_bytes(uint64_t bytes) { inline_cap_bytes_ = bytes; }

  // Sets the deadline of one call; none where the timeout is 0.
  void Prepare(grpc::ClientContext* context) const;

  // One unary call. While the daemon is UNAVAILABLE it is repeated, with growing pauses, until
  // `retry_budget` is spent: only for calls that may run twice, or that carry a sequence.
  template <class Stub, class Request, class Response>
  absl::Status Call(Stub& stub, Method<Stub, Request, Response> method, const Request& request,
                    Response* response, Milliseconds retry_budget = Milliseconds(0)) const {
    return Repeat(retry_budget, [&] {
      grpc::ClientContext context;
      Prepare(&context);
      response->Clear();
      const grpc::Status status = (stub.*method)(&context, request, response);
      return ToAbsl(status, context, target_);
    });
  }

  // Calls `once` until it is no longer UNAVAILABLE or the budget is spent.
  template <class Once>
  absl::Status Repeat(Milliseconds retry_budget, const Once& once) const {
    const Clock::time_point give_up = Clock::now() + retry_budget;
    Milliseconds pause(20);
    for (;;) {
      absl::Status status = once();
      if (status.code() != absl::StatusCode::kUnavailable || Clock::now() >= give_up) {
        return status;
      }
      PauseBeforeRepeat(pause);
      pause = std::min(pause * 2, Milliseconds(500));
    }
  }

  // For so long, or until a connection is there that was not. gRPC looks after a connection that it
  // is making only while somebody waits for it.
  void PauseBeforeRepeat(Milliseconds pause) const;

 private:
  Connection() = default;
  std::string target_;
  bool on_this_host_ = false;
  ConnectOptions options_;
  std::shared_ptr<grpc::Channel> channel_;
  std::unique_ptr<pb::ConfigService::Stub> config_;
  std::unique_ptr<pb::LayerService::Stub> layers_;
  std::unique_ptr<pb::SessionService::Stub> sessions_;
  uint64_t inline_cap_bytes_ = 0;  // set once, before others see this
};

}  // namespace lamina::client::internal
