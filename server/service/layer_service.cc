#include "server/service/layer_service.h"

#include "server/service/calls.h"
#include "server/service/execute_stream.h"
#include "server/service/layer_calls.h"
#include "server/service/status.h"

namespace lamina {

grpc::Status LayerServiceImpl::Forward(grpc::ServerContext* context,
                                       const v1::ForwardRequest* request,
                                       v1::ForwardResponse* response) {
  return ToGrpc(RunCall(state_, *request, ControlOf(context), response));
}

grpc::Status LayerServiceImpl::Backward(grpc::ServerContext* context,
                                        const v1::BackwardRequest* request,
                                        v1::BackwardResponse* response) {
  return ToGrpc(RunCall(state_, *request, ControlOf(context), response));
}

grpc::Status LayerServiceImpl::ApplyGradients(grpc::ServerContext* context,
                                              const v1::ApplyGradientsRequest* request,
                                              v1::ApplyGradientsResponse* response) {
  return ToGrpc(RunCall(state_, *request, ControlOf(context), response));
}

grpc::Status LayerServiceImpl::ZeroGradients(grpc::ServerContext* context,
                                             const v1::ZeroGradientsRequest* request,
                                             v1::ZeroGradientsResponse* response) {
  return ToGrpc(RunCall(state_, *request, ControlOf(context), response));
}

grpc::Status LayerServiceImpl::ReleaseContext(grpc::ServerContext* context,
                                              const v1::ReleaseContextRequest* request,
                                              v1::ReleaseContextResponse* response) {
  return ToGrpc(RunCall(state_, *request, ControlOf(context), response));
}

grpc::Status LayerServiceImpl::Execute(
    grpc::ServerContext* context,
    grpc::ServerReaderWriter<v1::ExecuteResponse, v1::ExecuteRequest>* stream) {
  return ToGrpc(RunExecuteStream(state_, ControlOf(context), *stream));
}

}  // namespace lamina
