// The unary calls of SessionService: leases and regions.
//
// Threads: any; one may wait for the device, where it ends a session or registers memory.
#pragma once

#include "absl/status/status.h"
#include "lamina/v1/session_service.pb.h"
#include "server/service/shared_state.h"

namespace lamina {

absl::Status RunCall(SharedState& state, const v1::CreateSessionRequest& request,
                     const CallControl& control, v1::CreateSessionResponse* response);
absl::Status RunCall(SharedState& state, const v1::DeleteSessionRequest& request,
                     const CallControl& control, v1::DeleteSessionResponse* response);
absl::Status RunCall(SharedState& state, const v1::CreateRegionRequest& request,
                     const CallControl& control, v1::CreateRegionResponse* response);
absl::Status RunCall(SharedState& state, const v1::ListRegionsRequest& request,
                     const CallControl& control, v1::ListRegionsResponse* response);
absl::Status RunCall(SharedState& state, const v1::ReleaseRegionRequest& request,
                     const CallControl& control, v1::ReleaseRegionResponse* response);

}  // namespace lamina
