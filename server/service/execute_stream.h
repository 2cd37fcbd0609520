// LayerService.Execute: a stream of calls that are run in order while more are read.
#pragma once

#include <grpcpp/server_context.h>
#include <grpcpp/support/server_callback.h>

#include <cstddef>

#include "lamina/v1/layer_service.pb.h"
#include "server/service/shared_state.h"
#include "server/service/workers.h"

namespace lamina {

// Calls of a stream that wait while one runs; no more are read until there are fewer.
constexpr size_t kExecuteStreamDepth = 64;
// Answers of a stream that wait until the client takes them; no more calls are run until there are
// fewer.
constexpr size_t kExecuteUnsentAnswers = 4;
// Calls of a stream that the device may have at a time: one runs, one is enqueued behind it.
constexpr size_t kExecuteInFlight = 2;

// Serves a stream to its end and deletes itself then. The stream's deadline, or its client's going,
// lets no call begin. INVALID_ARGUMENT: an id that is not above the one before.
grpc::ServerBidiReactor<v1::ExecuteRequest, v1::ExecuteResponse>* NewExecuteStream(
    SharedState& state, Workers& workers, grpc::CallbackServerContext* context);

}  // namespace lamina
