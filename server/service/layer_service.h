// LayerService: Forward, Backward, ApplyGradients, ZeroGradients, ReleaseContext, Execute.
#pragma once

#include "lamina/v1/layer_service.grpc.pb.h"
#include "server/service/shared_state.h"

namespace lamina {

class LayerServiceImpl final : public v1::LayerService::Service {
 public:
  explicit LayerServiceImpl(SharedState& state) : state_(state) {}

  grpc::Status Forward(grpc::ServerContext* context, const v1::ForwardRequest* request,
                       v1::ForwardResponse* response) override;
  grpc::Status Backward(grpc::ServerContext* context, const v1::BackwardRequest* request,
                        v1::BackwardResponse* response) override;
  grpc::Status ApplyGradients(grpc::ServerContext* context,
                              const v1::ApplyGradientsRequest* request,
                              v1::ApplyGradientsResponse* response) override;
  grpc::Status ZeroGradients(grpc::ServerContext* context, const v1::ZeroGradientsRequest* request,
                             v1::ZeroGradientsResponse* response) override;
  grpc::Status ReleaseContext(grpc::ServerContext* context,
                              const v1::ReleaseContextRequest* request,
                              v1::ReleaseContextResponse* response) override;
  grpc::Status Execute(
      grpc::ServerContext* context,
      grpc::ServerReaderWriter<v1::ExecuteResponse, v1::ExecuteRequest>* stream) override;

 private:
  SharedState& state_;
};

}  // namespace lamina
