// LayerService: Forward, Backward, ApplyGradients, ZeroGradients, ReleaseContext, Execute.
#pragma once

#include "lamina/v1/layer_service.grpc.pb.h"
#include "server/service/shared_state.h"
#include "server/service/workers.h"

namespace lamina {

class LayerServiceImpl final : public v1::LayerService::CallbackService {
 public:
  LayerServiceImpl(SharedState& state, Workers& workers) : state_(state), workers_(workers) {}

  grpc::ServerUnaryReactor* Forward(grpc::CallbackServerContext* context,
                                    const v1::ForwardRequest* request,
                                    v1::ForwardResponse* response) override;
  grpc::ServerUnaryReactor* Backward(grpc::CallbackServerContext* context,
                                     const v1::BackwardRequest* request,
                                     v1::BackwardResponse* response) override;
  grpc::ServerUnaryReactor* ApplyGradients(grpc::CallbackServerContext* context,
                                           const v1::ApplyGradientsRequest* request,
                                           v1::ApplyGradientsResponse* response) override;
  grpc::ServerUnaryReactor* ZeroGradients(grpc::CallbackServerContext* context,
                                          const v1::ZeroGradientsRequest* request,
                                          v1::ZeroGradientsResponse* response) override;
  grpc::ServerUnaryReactor* ReleaseContext(grpc::CallbackServerContext* context,
                                           const v1::ReleaseContextRequest* request,
                                           v1::ReleaseContextResponse* response) override;
  grpc::ServerBidiReactor<v1::ExecuteRequest, v1::ExecuteResponse>* Execute(
      grpc::CallbackServerContext* context) override;

 private:
  SharedState& state_;
  Workers& workers_;
};

}  // namespace lamina
