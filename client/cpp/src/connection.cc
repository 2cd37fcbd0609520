#include "src/connection.h"

#include <grpcpp/support/channel_arguments.h>

#include <thread>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "src/channel.h"

namespace lamina::client::internal {
namespace {

// What gRPC takes. INVALID_ARGUMENT for what it would only complain about at the first call.
absl::StatusOr<std::string> Normalize(const std::string& target) {
  if (target.empty()) return DefaultTarget();
  if (target.front() == '/') return absl::StrCat("unix:", target);
  if (absl::StartsWith(target, "unix:")) {
    if (target == "unix:" || target == "unix://") {
      return absl::InvalidArgumentError(absl::StrCat("target '", target, "' names no socket"));
    }
    return target;
  }
  if (target.find(':') == std::string::npos) {
    return absl::InvalidArgumentError(
        absl::StrCat("target '", target, "' is none of unix:PATH, HOST:PORT and an absolute path"));
  }
  return target;
}

// Of the status's payload.
constexpr char kRequestIdPayload[] = "lamina.v1/x-request-id";

}  // namespace

absl::Status ToAbsl(const grpc::Status& status, const std::string& target) {
  if (status.ok()) return absl::OkStatus();
  const auto code = static_cast<absl::StatusCode>(status.error_code());
  if (code == absl::StatusCode::kUnavailable) {
    return absl::Status(code, absl::StrCat(target, ": ", status.error_message()));
  }
  return absl::Status(code, status.error_message());
}

absl::Status WithRequestId(absl::Status status, const std::string& id) {
  if (!status.ok() && !id.empty()) status.SetPayload(kRequestIdPayload, absl::Cord(id));
  return status;
}

absl::Status ToAbsl(const grpc::Status& status, const grpc::ClientContext& context,
                    const std::string& target) {
  if (status.ok()) return absl::OkStatus();
  const auto& metadata = context.GetServerTrailingMetadata();
  const auto id = metadata.find("x-request-id");
  return WithRequestId(
      ToAbsl(status, target),
      id == metadata.end() ? "" : std::string(id->second.data(), id->second.size()));
}

absl::StatusOr<std::shared_ptr<Connection>> Connection::Create(const std::string& target,
                                                               const ConnectOptions& options) {
  absl::StatusOr<std::string> normal = Normalize(target);
  if (!normal.ok()) return normal.status();
  std::shared_ptr<Connection> connection(new Connection());
  connection->target_ = *std::move(normal);
  connection->on_this_host_ = IsOnThisHost(connection->target_);
  connection->options_ = options;
  grpc::ChannelArguments arguments;
  // The daemon's inline cap is the limit, not gRPC's 4 MB.
  arguments.SetMaxReceiveMessageSize(-1);
  arguments.SetMaxSendMessageSize(-1);
  // Each Client is a connection of its own; else gRPC would let those to one target share one.
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  // A daemon that comes back is found again quickly: the retries' budget is seconds, not minutes.
  arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 50);
  arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 1000);
  // For gRPC this is how long one attempt may take. A daemon that is far or busy answers late; one
  // that isn't there is known at once, whatever stands here.
  arguments.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, 5000);
  if (!connection->on_this_host_) {
    // A connection over which nothing comes any more, not even an answer to a ping, is broken
    // although nobody closed it: that is to be known within the lease, so that another one can
    // resume the session.
    arguments.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, 10000);
    arguments.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 10000);
    // Newer gRPC's own pings hold the next one back until they are answered: for a minute, unless
    // told. Older headers have no name for it.
    arguments.SetInt("grpc.http2.ping_timeout_ms", 10000);
  }
  absl::StatusOr<std::shared_ptr<grpc::Channel>> channel =
      OpenChannel(connection->target_,
                  options.security ? *options.security : Security::FromEnvironment(), arguments);
  if (!channel.ok()) return channel.status();
  connection->channel_ = *std::move(channel);
  connection->config_ = pb::ConfigService::NewStub(connection->channel_);
  connection->layers_ = pb::LayerService::NewStub(connection->channel_);
  connection->sessions_ = pb::SessionService::NewStub(connection->channel_);
  return connection;
}

void Connection::PauseBeforeRepeat(Milliseconds pause) const {
  if (channel_->GetState(/*try_to_connect=*/true) == GRPC_CHANNEL_READY) {
    std::this_thread::sleep_for(pause);
  } else {
    channel_->WaitForConnected(std::chrono::system_clock::now() + pause);
  }
}

void Connection::Prepare(grpc::ClientContext* context) const {
  if (options_.call_timeout.count() > 0) {
    context->set_deadline(std::chrono::system_clock::now() + options_.call_timeout);
  }
}

}  // namespace lamina::client::internal

namespace lamina::client {

std::string RequestIdOf(const absl::Status& status) {
  const absl::optional<absl::Cord> id = status.GetPayload(internal::kRequestIdPayload);
  return id.has_value() ? std::string(*id) : "";
}

}  // namespace lamina::client
