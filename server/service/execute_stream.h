// LayerService.Execute: a stream of calls that are run in order while more are read.
#pragma once

#include <grpcpp/support/sync_stream.h>

#include "absl/status/status.h"
#include "lamina/v1/layer_service.pb.h"
#include "server/service/shared_state.h"

namespace lamina {

// Calls of a stream that wait while one runs; no more are read until there are fewer.
constexpr size_t kExecuteStreamDepth = 64;

// Serves a stream to its end, on the calling thread and one of its own. `control`: the stream's
// deadline and whether its client is gone; neither lets a call begin. INVALID_ARGUMENT: an id that
// is not above the one before.
absl::Status RunExecuteStream(
    SharedState& state, const CallControl& control,
    grpc::ServerReaderWriterInterface<v1::ExecuteResponse, v1::ExecuteRequest>& stream);

}  // namespace lamina
