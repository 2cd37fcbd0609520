// From gRPC's callbacks to the calls, which are plain functions
//   absl::Status RunCall(SharedState&, const Request&, const CallControl&, Response*).
#pragma once

#include <grpcpp/server_context.h>
#include <grpcpp/support/server_callback.h>

#include "server/service/admission.h"
#include "server/service/calls.h"
#include "server/service/request_tag.h"
#include "server/service/shared_state.h"
#include "server/service/status.h"
#include "server/service/workers.h"

namespace lamina {

// A call's deadline, whether its client has gone, and whose it is. The context must outlive the
// result.
inline CallControl ControlOf(const SharedState& state, grpc::ServerContextBase* context) {
  CallControl control;
  const auto deadline = context->deadline();
  if (deadline != std::chrono::system_clock::time_point::max()) {
    control.deadline = absl::FromChrono(deadline);
  }
  control.cancelled = [context] { return context->IsCancelled(); };
  control.caller = CallerOf(state.access, context);
  Tag(*context, control);
  return control;
}

// Runs a unary call on a thread on which it may wait, and answers it by its reactor.
template <typename Request, typename Response>
void AnswerOnWorker(SharedState& state, Workers& workers, grpc::CallbackServerContext* context,
                    const Request* request, Response* response, grpc::ServerUnaryReactor* reactor) {
  workers.Run([=, &state] {
    reactor->Finish(ToGrpc(
        Guarded([&] { return RunCall(state, *request, ControlOf(state, context), response); })));
  });
}

// The whole of a method whose calls may wait.
template <typename Request, typename Response>
grpc::ServerUnaryReactor* ServeOnWorker(SharedState& state, Workers& workers,
                                        grpc::CallbackServerContext* context,
                                        const Request* request, Response* response) {
  grpc::ServerUnaryReactor* const reactor = context->DefaultReactor();
  AnswerOnWorker(state, workers, context, request, response, reactor);
  return reactor;
}

}  // namespace lamina
