#include "server/service/config_service.h"

#include <spdlog/spdlog.h>

#include <utility>

#include "absl/strings/escaping.h"
#include "server/service/calls.h"
#include "server/service/conversions.h"
#include "server/service/parameters.h"
#include "server/service/status.h"

namespace lamina {

grpc::Status ConfigServiceImpl::GetServerInfo(grpc::ServerContext*, const v1::GetServerInfoRequest*,
                                              v1::GetServerInfoResponse* response) {
  const DeviceInfo& device = state_.engine.device();
  const EngineOptions& options = state_.engine.options();
  response->set_version(state_.version);
  response->set_backend(device.kind);
  response->set_device_name(device.name);
  response->set_device_uuid(device.uuid);
  response->set_device_ordinal(device.ordinal);
  response->set_device_total_bytes(device.total_bytes);
  response->set_device_free_bytes(state_.engine.device_free_bytes());
  response->set_inline_cap_bytes(options.inline_cap_bytes);
  response->set_replay_window(MutationLog::kReplayWindow);
  response->add_transports(v1::TRANSPORT_INLINE);
  if (!state_.broker_path.empty()) response->add_transports(v1::TRANSPORT_MEMFD);
  response->set_uptime_seconds(absl::ToDoubleSeconds(absl::Now() - state_.started));
  response->set_checkpoints_enabled(!options.checkpoint_dir.empty());
  response->set_build_commit(state_.commit);
  return grpc::Status::OK;
}

grpc::Status ConfigServiceImpl::CreateStack(grpc::ServerContext* context,
                                            const v1::CreateStackRequest* request,
                                            v1::CreateStackResponse* response) {
  const Gate::Pass pass(state_.gate);
  if (!pass.status().ok()) return ToGrpc(pass.status());
  auto config = FromProto(request->config());
  if (!config.ok()) return ToGrpc(config.status());
  auto info = state_.engine.CreateStack(request->name(), *config, ControlOf(context));
  if (!info.ok()) {
    spdlog::warn("event=create_stack_refused code={} reason=\"{}\"",
                 absl::StatusCodeToString(info.status().code()),
                 absl::CEscape(info.status().message()));
    return ToGrpc(info.status());
  }
  spdlog::info("event=stack_created stack={} parameters={} plan_bytes={}", info->name,
               info->parameter_count, info->plan.Total());
  *response->mutable_stack() = ToProto(*info);
  return grpc::Status::OK;
}

grpc::Status ConfigServiceImpl::GetStack(grpc::ServerContext*, const v1::GetStackRequest* request,
                                         v1::GetStackResponse* response) {
  const Gate::Pass pass(state_.gate);
  if (!pass.status().ok()) return ToGrpc(pass.status());
  auto info = state_.engine.GetStack(request->name());
  if (!info.ok()) return ToGrpc(info.status());
  *response->mutable_stack() = ToProto(*info);
  for (const ParameterInfo& parameter : info->parameters) {
    *response->add_parameters() = ToProto(parameter);
  }
  return grpc::Status::OK;
}

grpc::Status ConfigServiceImpl::ListStacks(grpc::ServerContext*, const v1::ListStacksRequest*,
                                           v1::ListStacksResponse* response) {
  const Gate::Pass pass(state_.gate);
  if (!pass.status().ok()) return ToGrpc(pass.status());
  for (const StackInfo& info : state_.engine.ListStacks()) *response->add_stacks() = ToProto(info);
  return grpc::Status::OK;
}

grpc::Status ConfigServiceImpl::UpdateStack(grpc::ServerContext* context,
                                            const v1::UpdateStackRequest* request,
                                            v1::UpdateStackResponse* response) {
  const Gate::Pass pass(state_.gate);
  if (!pass.status().ok()) return ToGrpc(pass.status());
  auto info = state_.engine.UpdateStack(request->name(), FromProto(*request), ControlOf(context));
  if (!info.ok()) return ToGrpc(info.status());
  spdlog::info("event=stack_updated stack={}", info->name);
  *response->mutable_stack() = ToProto(*info);
  return grpc::Status::OK;
}

grpc::Status ConfigServiceImpl::DeleteStack(grpc::ServerContext* context,
                                            const v1::DeleteStackRequest* request,
                                            v1::DeleteStackResponse*) {
  const Gate::Pass pass(state_.gate);
  if (!pass.status().ok()) return ToGrpc(pass.status());
  absl::Status status = state_.engine.DeleteStack(request->name(), ControlOf(context));
  if (status.ok()) spdlog::info("event=stack_deleted stack={}", request->name());
  return ToGrpc(status);
}

grpc::Status ConfigServiceImpl::PlanMemory(grpc::ServerContext*,
                                           const v1::PlanMemoryRequest* request,
                                           v1::PlanMemoryResponse* response) {
  const Gate::Pass pass(state_.gate);
  if (!pass.status().ok()) return ToGrpc(pass.status());
  auto config = FromProto(request->config());
  if (!config.ok()) return ToGrpc(config.status());
  auto outcome = state_.engine.PlanMemory(*config);
  if (!outcome.ok()) return ToGrpc(outcome.status());
  *response->mutable_plan() = ToProto(outcome->plan);
  response->set_device_free_bytes(outcome->free_bytes);
  response->set_fits(outcome->plan.Total() <= outcome->free_bytes);
  return grpc::Status::OK;
}

grpc::Status ConfigServiceImpl::GetParameters(grpc::ServerContext* context,
                                              const v1::GetParametersRequest* request,
                                              v1::GetParametersResponse* response) {
  const Gate::Pass pass(state_.gate);
  if (!pass.status().ok()) return ToGrpc(pass.status());
  const ParameterQuery query{request->stack(),
                             {request->names().begin(), request->names().end()},
                             request->dtype(),
                             false};
  return ToGrpc(ReadParametersTo(state_, query, request->session_id(), request->target(),
                                 ControlOf(context), response->mutable_tensors()));
}

grpc::Status ConfigServiceImpl::StreamParameters(
    grpc::ServerContext* context, const v1::StreamParametersRequest* request,
    grpc::ServerWriter<v1::StreamParametersResponse>* writer) {
  const Gate::Pass pass(state_.gate);
  if (!pass.status().ok()) return ToGrpc(pass.status());
  const ParameterQuery query{request->stack(),
                             {request->names().begin(), request->names().end()},
                             request->dtype(),
                             request->gradients()};
  return ToGrpc(StreamParametersTo(state_, query, ControlOf(context), writer));
}

grpc::Status ConfigServiceImpl::SetParameters(grpc::ServerContext* context,
                                              const v1::SetParametersRequest* request,
                                              v1::SetParametersResponse* response) {
  const Gate::Pass pass(state_.gate);
  if (!pass.status().ok()) return ToGrpc(pass.status());
  auto session = MutatingSession(state_, request->has_mutation(), request->mutation());
  if (!session.ok()) return ToGrpc(session.status());
  const CallControl control = ControlOf(context);
  return ToGrpc(RunOnce(state_, **session, *request, control, response,
                        [&] { return WriteParametersFrom(state_, *request, **session, control); }));
}

grpc::Status ConfigServiceImpl::GetGradients(grpc::ServerContext* context,
                                             const v1::GetGradientsRequest* request,
                                             v1::GetGradientsResponse* response) {
  const Gate::Pass pass(state_.gate);
  if (!pass.status().ok()) return ToGrpc(pass.status());
  const ParameterQuery query{request->stack(),
                             {request->names().begin(), request->names().end()},
                             v1::DATA_TYPE_FLOAT32,
                             true};
  return ToGrpc(ReadParametersTo(state_, query, request->session_id(), request->target(),
                                 ControlOf(context), response->mutable_tensors()));
}

grpc::Status ConfigServiceImpl::SaveCheckpoint(grpc::ServerContext* context,
                                               const v1::SaveCheckpointRequest* request,
                                               v1::SaveCheckpointResponse* response) {
  const Gate::Pass pass(state_.gate);
  if (!pass.status().ok()) return ToGrpc(pass.status());
  auto saved = state_.engine.SaveCheckpoint(request->stack(), request->name(), ControlOf(context));
  if (!saved.ok()) return ToGrpc(saved.status());
  spdlog::info("event=checkpoint_saved stack={} path={} bytes={} step={}", request->stack(),
               saved->path, saved->bytes, saved->step);
  response->set_path(saved->path);
  response->set_size_bytes(saved->bytes);
  response->set_step(saved->step);
  return grpc::Status::OK;
}

grpc::Status ConfigServiceImpl::LoadCheckpoint(grpc::ServerContext* context,
                                               const v1::LoadCheckpointRequest* request,
                                               v1::LoadCheckpointResponse* response) {
  const Gate::Pass pass(state_.gate);
  if (!pass.status().ok()) return ToGrpc(pass.status());
  auto info = state_.engine.LoadCheckpoint(request->stack(), request->name(), request->create(),
                                           ControlOf(context));
  if (!info.ok()) return ToGrpc(info.status());
  spdlog::info("event=checkpoint_loaded stack={} step={}", info->name,
               info->counters.optimizer_step);
  *response->mutable_stack() = ToProto(*info);
  return grpc::Status::OK;
}

}  // namespace lamina
