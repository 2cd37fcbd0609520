// SessionService: leases and regions.
#pragma once

#include "lamina/v1/session_service.grpc.pb.h"
#include "server/service/serve.h"
#include "server/service/session_calls.h"

namespace lamina {

class SessionServiceImpl final : public v1::SessionService::CallbackService {
 public:
  SessionServiceImpl(SharedState& state, Workers& workers) : state_(state), workers_(workers) {}

  grpc::ServerUnaryReactor* CreateSession(grpc::CallbackServerContext* context,
                                          const v1::CreateSessionRequest* request,
                                          v1::CreateSessionResponse* response) override {
    return ServeOnWorker(state_, workers_, context, request, response);
  }
  grpc::ServerUnaryReactor* DeleteSession(grpc::CallbackServerContext* context,
                                          const v1::DeleteSessionRequest* request,
                                          v1::DeleteSessionResponse* response) override {
    return ServeOnWorker(state_, workers_, context, request, response);
  }
  grpc::ServerUnaryReactor* CreateRegion(grpc::CallbackServerContext* context,
                                         const v1::CreateRegionRequest* request,
                                         v1::CreateRegionResponse* response) override {
    return ServeOnWorker(state_, workers_, context, request, response);
  }
  grpc::ServerUnaryReactor* ListRegions(grpc::CallbackServerContext* context,
                                        const v1::ListRegionsRequest* request,
                                        v1::ListRegionsResponse* response) override {
    return ServeOnWorker(state_, workers_, context, request, response);
  }
  grpc::ServerUnaryReactor* ReleaseRegion(grpc::CallbackServerContext* context,
                                          const v1::ReleaseRegionRequest* request,
                                          v1::ReleaseRegionResponse* response) override {
    return ServeOnWorker(state_, workers_, context, request, response);
  }
  grpc::ServerBidiReactor<v1::KeepAliveRequest, v1::KeepAliveResponse>* KeepAlive(
      grpc::CallbackServerContext* context) override;

 private:
  SharedState& state_;
  Workers& workers_;
};

}  // namespace lamina
