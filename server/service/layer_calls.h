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

// Whether the request, and what it asks for in its answer, are short: to be read and written in no
// time to speak of, wherever the elements of its tensors are.
bool IsShort(const v1::ForwardRequest& request);
bool IsShort(const v1::BackwardRequest& request);
bool IsShort(const v1::ApplyGradientsRequest& request);
bool IsShort(const v1::ZeroGradientsRequest& request);
bool IsShort(const v1::ReleaseContextRequest& request);

// Runs the call, with its outcome in `status`, if it is one of microseconds and nothing on the
// device is before it; whoever may not wait can then run it on the spot. False: it was not run, and
// is RunCall's.
bool TryCall(SharedState& state, const v1::ForwardRequest& request, CallControl control,
             v1::ForwardResponse* response, absl::Status* status);
bool TryCall(SharedState& state, const v1::BackwardRequest& request, CallControl control,
             v1::BackwardResponse* response, absl::Status* status);
bool TryCall(SharedState& state, const v1::ApplyGradientsRequest& request, CallControl control,
             v1::ApplyGradientsResponse* response, absl::Status* status);
bool TryCall(SharedState& state, const v1::ZeroGradientsRequest& request, CallControl control,
             v1::ZeroGradientsResponse* response, absl::Status* status);
bool TryCall(SharedState& state, const v1::ReleaseContextRequest& request, CallControl control,
             v1::ReleaseContextResponse* response, absl::Status* status);

}  // namespace lamina
