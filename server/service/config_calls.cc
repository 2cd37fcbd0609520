#include "server/service/config_calls.h"

#include <spdlog/spdlog.h>

#include <utility>

#include "server/logging.h"
#include "server/service/calls.h"
#include "server/service/conversions.h"
#include "server/service/parameters.h"
#include "server/service/request_tag.h"

namespace lamina {

absl::Status RunCall(SharedState& state, const v1::GetServerInfoRequest&, const CallControl&,
                     v1::GetServerInfoResponse* response) {
  const DeviceInfo& device = state.engine.device();
  const EngineOptions& options = state.engine.options();
  response->set_version(state.version);
  response->set_backend(device.kind);
  response->set_device_name(device.name);
  response->set_device_uuid(device.uuid);
  response->set_device_ordinal(device.ordinal);
  response->set_device_total_bytes(device.total_bytes);
  response->set_device_free_bytes(state.engine.device_free_bytes());
  response->set_inline_cap_bytes(options.inline_cap_bytes);
  response->set_replay_window(MutationLog::kReplayWindow);
  response->add_transports(v1::TRANSPORT_INLINE);
  if (!state.broker_path.empty()) response->add_transports(v1::TRANSPORT_MEMFD);
  if (state.sessions.offers_device_regions() && !state.broker_path.empty()) {
    response->add_transports(v1::TRANSPORT_DEVICE);
    response->set_total_device_region_cap_bytes(
        state.sessions.options().total_device_region_cap_bytes);
  }
  response->set_device_region_bytes(state.sessions.device_region_bytes());
  response->set_uptime_seconds(absl::ToDoubleSeconds(absl::Now() - state.started));
  response->set_checkpoints_enabled(!options.checkpoint_dir.empty());
  response->set_build_commit(state.commit);
  response->set_metrics_address(state.metrics_address);
  return absl::OkStatus();
}

absl::Status RunCall(SharedState& state, const v1::CreateStackRequest& request,
                     const CallControl& control, v1::CreateStackResponse* response) {
  const Gate::Pass pass(state.gate);
  if (!pass.status().ok()) return pass.status();
  auto config = FromProto(request.config());
  if (!config.ok()) return config.status();
  auto info = state.engine.CreateStack(request.name(), *config, control);
  if (!info.ok()) {
    spdlog::warn("event=create_stack_refused code={} reason={}{}",
                 absl::StatusCodeToString(info.status().code()), Quoted(info.status().message()),
                 TagFields(control));
    return info.status();
  }
  spdlog::info("event=stack_created stack={} parameters={} plan_bytes={}{}", info->name,
               info->parameter_count, info->plan.Total(), TagFields(control));
  *response->mutable_stack() = ToProto(*info);
  return absl::OkStatus();
}

absl::Status RunCall(SharedState& state, const v1::GetStackRequest& request, const CallControl&,
                     v1::GetStackResponse* response) {
  const Gate::Pass pass(state.gate);
  if (!pass.status().ok()) return pass.status();
  auto info = state.engine.GetStack(request.name());
  if (!info.ok()) return info.status();
  *response->mutable_stack() = ToProto(*info);
  for (const ParameterInfo& parameter : info->parameters) {
    *response->add_parameters() = ToProto(parameter);
  }
  return absl::OkStatus();
}

absl::Status RunCall(SharedState& state, const v1::ListStacksRequest&, const CallControl&,
                     v1::ListStacksResponse* response) {
  const Gate::Pass pass(state.gate);
  if (!pass.status().ok()) return pass.status();
  for (const StackInfo& info : state.engine.ListStacks()) *response->add_stacks() = ToProto(info);
  return absl::OkStatus();
}

absl::Status RunCall(SharedState& state, const v1::UpdateStackRequest& request,
                     const CallControl& control, v1::UpdateStackResponse* response) {
  const Gate::Pass pass(state.gate);
  if (!pass.status().ok()) return pass.status();
  auto info = state.engine.UpdateStack(request.name(), FromProto(request), control);
  if (!info.ok()) return info.status();
  spdlog::info("event=stack_updated stack={}{}", info->name, TagFields(control));
  *response->mutable_stack() = ToProto(*info);
  return absl::OkStatus();
}

absl::Status RunCall(SharedState& state, const v1::DeleteStackRequest& request,
                     const CallControl& control, v1::DeleteStackResponse*) {
  const Gate::Pass pass(state.gate);
  if (!pass.status().ok()) return pass.status();
  absl::Status status = state.engine.DeleteStack(request.name(), control);
  if (status.ok())
    spdlog::info("event=stack_deleted stack={}{}", request.name(), TagFields(control));
  return status;
}

absl::Status RunCall(SharedState& state, const v1::PlanMemoryRequest& request, const CallControl&,
                     v1::PlanMemoryResponse* response) {
  const Gate::Pass pass(state.gate);
  if (!pass.status().ok()) return pass.status();
  auto config = FromProto(request.config());
  if (!config.ok()) return config.status();
  auto outcome = state.engine.PlanMemory(*config);
  if (!outcome.ok()) return outcome.status();
  *response->mutable_plan() = ToProto(outcome->plan);
  response->set_device_free_bytes(outcome->free_bytes);
  response->set_fits(outcome->plan.Total() <= outcome->free_bytes);
  return absl::OkStatus();
}

absl::Status RunCall(SharedState& state, const v1::GetParametersRequest& request,
                     const CallControl& control, v1::GetParametersResponse* response) {
  const Gate::Pass pass(state.gate);
  if (!pass.status().ok()) return pass.status();
  const ParameterQuery query{
      request.stack(), {request.names().begin(), request.names().end()}, request.dtype(), false};
  return ReadParametersTo(state, query, request, control, response->mutable_tensors());
}

absl::Status StreamParameters(SharedState& state, const v1::StreamParametersRequest& request,
                              const CallControl& control,
                              absl::FunctionRef<bool(const v1::StreamParametersResponse&)> write) {
  const Gate::Pass pass(state.gate);
  if (!pass.status().ok()) return pass.status();
  const ParameterQuery query{request.stack(),
                             {request.names().begin(), request.names().end()},
                             request.dtype(),
                             request.gradients()};
  return StreamParametersTo(state, query, control, write);
}

absl::Status RunCall(SharedState& state, const v1::SetParametersRequest& request,
                     const CallControl& control, v1::SetParametersResponse* response) {
  const Gate::Pass pass(state.gate);
  if (!pass.status().ok()) return pass.status();
  auto session = MutatingSession(state, request.has_mutation(), request.mutation(), control);
  if (!session.ok()) return session.status();
  return RunOnce(state, **session, request, control, response,
                 [&] { return WriteParametersFrom(state, request, **session, control); });
}

absl::Status RunCall(SharedState& state, const v1::GetGradientsRequest& request,
                     const CallControl& control, v1::GetGradientsResponse* response) {
  const Gate::Pass pass(state.gate);
  if (!pass.status().ok()) return pass.status();
  const ParameterQuery query{request.stack(),
                             {request.names().begin(), request.names().end()},
                             v1::DATA_TYPE_FLOAT32,
                             true};
  return ReadParametersTo(state, query, request, control, response->mutable_tensors());
}

absl::Status RunCall(SharedState& state, const v1::SaveCheckpointRequest& request,
                     const CallControl& control, v1::SaveCheckpointResponse* response) {
  const Gate::Pass pass(state.gate);
  if (!pass.status().ok()) return pass.status();
  auto saved = state.engine.SaveCheckpoint(request.stack(), request.name(), control);
  if (!saved.ok()) return saved.status();
  spdlog::info("event=checkpoint_saved stack={} path={} bytes={} step={}{}", request.stack(),
               Quoted(saved->path), saved->bytes, saved->step, TagFields(control));
  response->set_path(saved->path);
  response->set_size_bytes(saved->bytes);
  response->set_step(saved->step);
  return absl::OkStatus();
}

absl::Status RunCall(SharedState& state, const v1::LoadCheckpointRequest& request,
                     const CallControl& control, v1::LoadCheckpointResponse* response) {
  const Gate::Pass pass(state.gate);
  if (!pass.status().ok()) return pass.status();
  auto info =
      state.engine.LoadCheckpoint(request.stack(), request.name(), request.create(), control);
  if (!info.ok()) return info.status();
  spdlog::info("event=checkpoint_loaded stack={} step={}{}", info->name,
               info->counters.optimizer_step, TagFields(control));
  *response->mutable_stack() = ToProto(*info);
  return absl::OkStatus();
}

}  // namespace lamina
