// ConfigService: stacks, plans, parameters, checkpoints.
#pragma once

#include "lamina/v1/config_service.grpc.pb.h"
#include "server/service/shared_state.h"

namespace lamina {

class ConfigServiceImpl final : public v1::ConfigService::Service {
 public:
  explicit ConfigServiceImpl(SharedState& state) : state_(state) {}

  grpc::Status GetServerInfo(grpc::ServerContext* context, const v1::GetServerInfoRequest* request,
                             v1::GetServerInfoResponse* response) override;
  grpc::Status CreateStack(grpc::ServerContext* context, const v1::CreateStackRequest* request,
                           v1::CreateStackResponse* response) override;
  grpc::Status GetStack(grpc::ServerContext* context, const v1::GetStackRequest* request,
                        v1::GetStackResponse* response) override;
  grpc::Status ListStacks(grpc::ServerContext* context, const v1::ListStacksRequest* request,
                          v1::ListStacksResponse* response) override;
  grpc::Status UpdateStack(grpc::ServerContext* context, const v1::UpdateStackRequest* request,
                           v1::UpdateStackResponse* response) override;
  grpc::Status DeleteStack(grpc::ServerContext* context, const v1::DeleteStackRequest* request,
                           v1::DeleteStackResponse* response) override;
  grpc::Status PlanMemory(grpc::ServerContext* context, const v1::PlanMemoryRequest* request,
                          v1::PlanMemoryResponse* response) override;
  grpc::Status GetParameters(grpc::ServerContext* context, const v1::GetParametersRequest* request,
                             v1::GetParametersResponse* response) override;
  grpc::Status StreamParameters(grpc::ServerContext* context,
                                const v1::StreamParametersRequest* request,
                                grpc::ServerWriter<v1::StreamParametersResponse>* writer) override;
  grpc::Status SetParameters(grpc::ServerContext* context, const v1::SetParametersRequest* request,
                             v1::SetParametersResponse* response) override;
  grpc::Status GetGradients(grpc::ServerContext* context, const v1::GetGradientsRequest* request,
                            v1::GetGradientsResponse* response) override;
  grpc::Status SaveCheckpoint(grpc::ServerContext* context,
                              const v1::SaveCheckpointRequest* request,
                              v1::SaveCheckpointResponse* response) override;
  grpc::Status LoadCheckpoint(grpc::ServerContext* context,
                              const v1::LoadCheckpointRequest* request,
                              v1::LoadCheckpointResponse* response) override;

 private:
  SharedState& state_;
};

}  // namespace lamina
