// ConfigService: stacks, plans, parameters, checkpoints.
#pragma once

#include "lamina/v1/config_service.grpc.pb.h"
#include "server/service/config_calls.h"
#include "server/service/serve.h"

namespace lamina {

class ConfigServiceImpl final : public v1::ConfigService::CallbackService {
 public:
  ConfigServiceImpl(SharedState& state, Workers& workers) : state_(state), workers_(workers) {}

  grpc::ServerUnaryReactor* GetServerInfo(grpc::CallbackServerContext* context,
                                          const v1::GetServerInfoRequest* request,
                                          v1::GetServerInfoResponse* response) override {
    return ServeOnWorker(state_, workers_, context, request, response);
  }
  grpc::ServerUnaryReactor* CreateStack(grpc::CallbackServerContext* context,
                                        const v1::CreateStackRequest* request,
                                        v1::CreateStackResponse* response) override {
    return ServeOnWorker(state_, workers_, context, request, response);
  }
  grpc::ServerUnaryReactor* GetStack(grpc::CallbackServerContext* context,
                                     const v1::GetStackRequest* request,
                                     v1::GetStackResponse* response) override {
    return ServeOnWorker(state_, workers_, context, request, response);
  }
  grpc::ServerUnaryReactor* ListStacks(grpc::CallbackServerContext* context,
                                       const v1::ListStacksRequest* request,
                                       v1::ListStacksResponse* response) override {
    return ServeOnWorker(state_, workers_, context, request, response);
  }
  grpc::ServerUnaryReactor* UpdateStack(grpc::CallbackServerContext* context,
                                        const v1::UpdateStackRequest* request,
                                        v1::UpdateStackResponse* response) override {
    return ServeOnWorker(state_, workers_, context, request, response);
  }
  grpc::ServerUnaryReactor* DeleteStack(grpc::CallbackServerContext* context,
                                        const v1::DeleteStackRequest* request,
                                        v1::DeleteStackResponse* response) override {
    return ServeOnWorker(state_, workers_, context, request, response);
  }
  grpc::ServerUnaryReactor* PlanMemory(grpc::CallbackServerContext* context,
                                       const v1::PlanMemoryRequest* request,
                                       v1::PlanMemoryResponse* response) override {
    return ServeOnWorker(state_, workers_, context, request, response);
  }
  grpc::ServerUnaryReactor* GetParameters(grpc::CallbackServerContext* context,
                                          const v1::GetParametersRequest* request,
                                          v1::GetParametersResponse* response) override {
    return ServeOnWorker(state_, workers_, context, request, response);
  }
  grpc::ServerUnaryReactor* SetParameters(grpc::CallbackServerContext* context,
                                          const v1::SetParametersRequest* request,
                                          v1::SetParametersResponse* response) override {
    return ServeOnWorker(state_, workers_, context, request, response);
  }
  grpc::ServerUnaryReactor* GetGradients(grpc::CallbackServerContext* context,
                                         const v1::GetGradientsRequest* request,
                                         v1::GetGradientsResponse* response) override {
    return ServeOnWorker(state_, workers_, context, request, response);
  }
  grpc::ServerUnaryReactor* SaveCheckpoint(grpc::CallbackServerContext* context,
                                           const v1::SaveCheckpointRequest* request,
                                           v1::SaveCheckpointResponse* response) override {
    return ServeOnWorker(state_, workers_, context, request, response);
  }
  grpc::ServerUnaryReactor* LoadCheckpoint(grpc::CallbackServerContext* context,
                                           const v1::LoadCheckpointRequest* request,
                                           v1::LoadCheckpointResponse* response) override {
    return ServeOnWorker(state_, workers_, context, request, response);
  }
  grpc::ServerWriteReactor<v1::StreamParametersResponse>* StreamParameters(
      grpc::CallbackServerContext* context, const v1::StreamParametersRequest* request) override;

 private:
  SharedState& state_;
  Workers& workers_;
};

}  // namespace lamina
