// The calls that drive a stack's layers, whichever way they came: by themselves or on an Execute
// stream. Each checks everything, runs, and fills the response; an error has changed nothing.
//
// Threads: any; one call blocks its thread until the device has run it.
#pragma once

#include "absl/status/status.h"
#include "lamina/v1/layer_service.pb.h"
#include "server/service/shared_state.h"

namespace lamina {

absl::Status RunCall(SharedState& state, const v1::ForwardRequest& request,
                     const CallControl& control, v1::ForwardResponse* response);
absl::Status RunCall(SharedState& state, const v1::BackwardRequest& request,
                     const CallControl& control, v1::BackwardResponse* response);
absl::Status RunCall(SharedState& state, const v1::ApplyGradientsRequest& request,
                     const CallControl& control, v1::ApplyGradientsResponse* response);
absl::Status RunCall(SharedState& state, const v1::ZeroGradientsRequest& request,
                     const CallControl& control, v1::ZeroGradientsResponse* response);
absl::Status RunCall(SharedState& state, const v1::ReleaseContextRequest& request,
                     const CallControl& control, v1::ReleaseContextResponse* response);

}  // namespace lamina
