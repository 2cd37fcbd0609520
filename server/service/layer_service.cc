#include "server/service/layer_service.h"

#include "server/service/execute_stream.h"
#include "server/service/layer_calls.h"
#include "server/service/serve.h"

namespace lamina {
namespace {

// Runs the call here if that takes no time to speak of; else on the device's own thread, if that is
// idle, with the answer sent from there; else on a thread on which it may wait.
template <typename Request, typename Response>
grpc::ServerUnaryReactor* Serve(SharedState& state, Workers& workers,
                                grpc::CallbackServerContext* context, const Request* request,
                                Response* response) {
  CallControl control = ControlOf(state, context);
  grpc::ServerUnaryReactor* const reactor = context->DefaultReactor();
  absl::Status done;
  if (TryCall(state, *request, control, response, &done)) {
    reactor->Finish(ToGrpc(done));
    return reactor;
  }
  control.has_turn = true;
  const auto on_device = [=, &state, &workers] {
    const absl::Status status =
        Guarded([&] { return RunCall(state, *request, control, response); });
    if (IsNotNow(status)) {
      AnswerOnWorker(state, workers, context, request, response, reactor);
    } else {
      reactor->Finish(ToGrpc(status));
    }
  };
  if (!IsShort(*request) || !state.engine.TryPost(on_device))
    AnswerOnWorker(state, workers, context, request, response, reactor);
  return reactor;
}

}  // namespace

grpc::ServerUnaryReactor* LayerServiceImpl::Forward(grpc::CallbackServerContext* context,
                                                    const v1::ForwardRequest* request,
                                                    v1::ForwardResponse* response) {
  return Serve(state_, workers_, context, request, response);
}

grpc::ServerUnaryReactor* LayerServiceImpl::Backward(grpc::CallbackServerContext* context,
                                                     const v1::BackwardRequest* request,
                                                     v1::BackwardResponse* response) {
  return Serve(state_, workers_, context, request, response);
}

grpc::ServerUnaryReactor* LayerServiceImpl::ApplyGradients(grpc::CallbackServerContext* context,
                                                           const v1::ApplyGradientsRequest* request,
                                                           v1::ApplyGradientsResponse* response) {
  return Serve(state_, workers_, context, request, response);
}

grpc::ServerUnaryReactor* LayerServiceImpl::ZeroGradients(grpc::CallbackServerContext* context,
                                                          const v1::ZeroGradientsRequest* request,
                                                          v1::ZeroGradientsResponse* response) {
  return Serve(state_, workers_, context, request, response);
}

grpc::ServerUnaryReactor* LayerServiceImpl::ReleaseContext(grpc::CallbackServerContext* context,
                                                           const v1::ReleaseContextRequest* request,
                                                           v1::ReleaseContextResponse* response) {
  return Serve(state_, workers_, context, request, response);
}

grpc::ServerBidiReactor<v1::ExecuteRequest, v1::ExecuteResponse>* LayerServiceImpl::Execute(
    grpc::CallbackServerContext* context) {
  return NewExecuteStream(state_, workers_, context);
}

}  // namespace lamina
