// How a channel to a daemon is made secure: TLS, the client's certificate, its token. Internal.
#pragma once

#include <grpcpp/channel.h>
#include <grpcpp/support/channel_arguments.h>

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "lamina/client.h"

namespace lamina::client::internal {

// Whether the target is a Unix socket.
bool IsOnThisHost(const std::string& target);

// Whether it is this host's own: of numbers, not of a name that begins like one. An IPv6 address
// may be in brackets.
bool IsLoopback(const std::string& host);

// A channel to `target`, as gRPC takes it. Does not connect yet. INVALID_ARGUMENT: what `security`
// says goes not together, or one of its files can't be read.
absl::StatusOr<std::shared_ptr<grpc::Channel>> OpenChannel(const std::string& target,
                                                           const Security& security,
                                                           grpc::ChannelArguments arguments);

}  // namespace lamina::client::internal
