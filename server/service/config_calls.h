// The calls of ConfigService: stacks, plans, parameters, checkpoints. Each checks everything, runs,
// and fills the response; an error has changed nothing.
//
// Threads: any; most block their thread until the device has run them.
#pragma once

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "lamina/v1/config_service.pb.h"
#include "server/service/shared_state.h"

namespace lamina {

absl::Status RunCall(SharedState& state, const v1::GetServerInfoRequest& request,
                     const CallControl& control, v1::GetServerInfoResponse* response);
absl::Status RunCall(SharedState& state, const v1::CreateStackRequest& request,
                     const CallControl& control, v1::CreateStackResponse* response);
absl::Status RunCall(SharedState& state, const v1::GetStackRequest& request,
                     const CallControl& control, v1::GetStackResponse* response);
absl::Status RunCall(SharedState& state, const v1::ListStacksRequest& request,
                     const CallControl& control, v1::ListStacksResponse* response);
absl::Status RunCall(SharedState& state, const v1::UpdateStackRequest& request,
                     const CallControl& control, v1::UpdateStackResponse* response);
absl::Status RunCall(SharedState& state, const v1::DeleteStackRequest& request,
                     const CallControl& control, v1::DeleteStackResponse* response);
absl::Status RunCall(SharedState& state, const v1::PlanMemoryRequest& request,
                     const CallControl& control, v1::PlanMemoryResponse* response);
absl::Status RunCall(SharedState& state, const v1::GetParametersRequest& request,
                     const CallControl& control, v1::GetParametersResponse* response);
absl::Status RunCall(SharedState& state, const v1::SetParametersRequest& request,
                     const CallControl& control, v1::SetParametersResponse* response);
absl::Status RunCall(SharedState& state, const v1::GetGradientsRequest& request,
                     const CallControl& control, v1::GetGradientsResponse* response);
absl::Status RunCall(SharedState& state, const v1::SaveCheckpointRequest& request,
                     const CallControl& control, v1::SaveCheckpointResponse* response);
absl::Status RunCall(SharedState& state, const v1::LoadCheckpointRequest& request,
                     const CallControl& control, v1::LoadCheckpointResponse* response);

// Gives the parts of the stream to `write`, which says whether the client still takes them.
absl::Status StreamParameters(SharedState& state, const v1::StreamParametersRequest& request,
                              const CallControl& control,
                              absl::FunctionRef<bool(const v1::StreamParametersResponse&)> write);

}  // namespace lamina
