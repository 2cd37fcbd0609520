#include "lamina/client.h"

#include <unistd.h>

#include <cstdlib>
#include <utility>

#include "absl/strings/str_cat.h"
#include "src/connection.h"
#include "src/session_core.h"
#include "src/wire.h"

namespace lamina::client {

using internal::Connection;
using internal::FromProto;
using internal::ToProto;
namespace pb = lamina::v1;

std::string DefaultTarget() {
  if (const char* target = std::getenv("LAMINA_TARGET"); target != nullptr && *target != '\0') {
    return *target == '/' ? absl::StrCat("unix:", target) : target;
  }
  if (geteuid() == 0) return "unix:/run/lamina/laminad.sock";
  if (const char* runtime = std::getenv("XDG_RUNTIME_DIR");
      runtime != nullptr && *runtime != '\0') {
    return absl::StrCat("unix:", runtime, "/lamina/laminad.sock");
  }
  return absl::StrCat("unix:/tmp/lamina-", geteuid(), "/laminad.sock");
}

Client::Client(std::shared_ptr<Connection> connection) : connection_(std::move(connection)) {}

absl::StatusOr<Client> Client::Connect(const std::string& target, const ConnectOptions& options) {
  absl::StatusOr<std::shared_ptr<Connection>> connection = Connection::Create(target, options);
  if (!connection.ok()) return connection.status();
  Connection& made = **connection;
  pb::GetServerInfoResponse response;
  absl::Status status = made.Call(made.config(), &pb::ConfigService::Stub::GetServerInfo,
                                  pb::GetServerInfoRequest(), &response, options.connect_timeout);
  if (!status.ok()) return status;
  made.set_inline_cap_bytes(response.inline_cap_bytes());
  return Client(*std::move(connection));
}

const std::string& Client::target() const { return connection_->target(); }

absl::StatusOr<ServerInfo> Client::Info() const {
  pb::GetServerInfoResponse response;
  absl::Status status =
      connection_->Call(connection_->config(), &pb::ConfigService::Stub::GetServerInfo,
                        pb::GetServerInfoRequest(), &response);
  if (!status.ok()) return status;
  return FromProto(response);
}

absl::StatusOr<Session> Client::OpenSession(const SessionOptions& options) const {
  absl::StatusOr<std::shared_ptr<internal::SessionCore>> core =
      internal::SessionCore::Open(connection_, options);
  if (!core.ok()) return core.status();
  return Session(*std::move(core));
}

absl::StatusOr<StackInfo> Client::CreateStack(const std::string& name,
                                              const StackConfig& config) const {
  pb::CreateStackRequest request;
  request.set_name(name);
  *request.mutable_config() = ToProto(config);
  pb::CreateStackResponse response;
  absl::Status status = connection_->Call(
      connection_->config(), &pb::ConfigService::Stub::CreateStack, request, &response);
  if (!status.ok()) return status;
  return FromProto(response.stack());
}

absl::StatusOr<StackInfo> Client::GetStack(const std::string& name) const {
  pb::GetStackRequest request;
  request.set_name(name);
  pb::GetStackResponse response;
  absl::Status status = connection_->Call(connection_->config(), &pb::ConfigService::Stub::GetStack,
                                          request, &response);
  if (!status.ok()) return status;
  StackInfo info = FromProto(response.stack());
  for (const pb::ParameterInfo& parameter : response.parameters()) {
    info.parameters.push_back({.name = parameter.name(), .shape = FromProto(parameter.shape())});
  }
  return info;
}

absl::StatusOr<std::vector<StackInfo>> Client::ListStacks() const {
  pb::ListStacksResponse response;
  absl::Status status =
      connection_->Call(connection_->config(), &pb::ConfigService::Stub::ListStacks,
                        pb::ListStacksRequest(), &response);
  if (!status.ok()) return status;
  std::vector<StackInfo> stacks;
  for (const pb::Stack& stack : response.stacks()) stacks.push_back(FromProto(stack));
  return stacks;
}

absl::StatusOr<StackInfo> Client::UpdateStack(const std::string& name,
                                              const StackUpdate& update) const {
  pb::UpdateStackRequest request;
  request.set_name(name);
  if (update.attn_dropout_ratio) request.set_attn_dropout_ratio(*update.attn_dropout_ratio);
  if (update.hidden_dropout_ratio) request.set_hidden_dropout_ratio(*update.hidden_dropout_ratio);
  if (update.training) request.set_training(*update.training);
  if (update.normalize_invertible) request.set_normalize_invertible(*update.normalize_invertible);
  if (update.gelu_checkpoint) request.set_gelu_checkpoint(*update.gelu_checkpoint);
  if (update.attn_dropout_checkpoint) {
    request.set_attn_dropout_checkpoint(*update.attn_dropout_checkpoint);
  }
  if (update.activation_checkpointing) {
    request.set_activation_checkpointing(*update.activation_checkpointing);
  }
  if (update.stochastic_mode) request.set_stochastic_mode(*update.stochastic_mode);
  pb::UpdateStackResponse response;
  absl::Status status = connection_->Call(
      connection_->config(), &pb::ConfigService::Stub::UpdateStack, request, &response);
  if (!status.ok()) return status;
  return FromProto(response.stack());
}

absl::Status Client::DeleteStack(const std::string& name) const {
  pb::DeleteStackRequest request;
  request.set_name(name);
  pb::DeleteStackResponse response;
  return connection_->Call(connection_->config(), &pb::ConfigService::Stub::DeleteStack, request,
                           &response);
}

absl::StatusOr<PlanResult> Client::PlanMemory(const StackConfig& config) const {
  pb::PlanMemoryRequest request;
  *request.mutable_config() = ToProto(config);
  pb::PlanMemoryResponse response;
  absl::Status status = connection_->Call(connection_->config(),
                                          &pb::ConfigService::Stub::PlanMemory, request, &response);
  if (!status.ok()) return status;
  return PlanResult{.plan = FromProto(response.plan()),
                    .device_free_bytes = response.device_free_bytes(),
                    .fits = response.fits()};
}

absl::StatusOr<SavedCheckpoint> Client::SaveCheckpoint(const std::string& stack,
                                                       const std::string& name) const {
  pb::SaveCheckpointRequest request;
  request.set_stack(stack);
  request.set_name(name);
  pb::SaveCheckpointResponse response;
  absl::Status status = connection_->Call(
      connection_->config(), &pb::ConfigService::Stub::SaveCheckpoint, request, &response);
  if (!status.ok()) return status;
  return SavedCheckpoint{
      .path = response.path(), .bytes = response.size_bytes(), .step = response.step()};
}

absl::StatusOr<StackInfo> Client::LoadCheckpoint(const std::string& stack, const std::string& name,
                                                 bool create) const {
  pb::LoadCheckpointRequest request;
  request.set_stack(stack);
  request.set_name(name);
  request.set_create(create);
  pb::LoadCheckpointResponse response;
  absl::Status status = connection_->Call(
      connection_->config(), &pb::ConfigService::Stub::LoadCheckpoint, request, &response);
  if (!status.ok()) return status;
  return FromProto(response.stack());
}

}  // namespace lamina::client
