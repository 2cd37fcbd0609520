// SessionService: leases and regions. KeepAlive uses the callback API: an open stream costs no
// thread.
#pragma once

#include "lamina/v1/session_service.grpc.pb.h"
#include "server/service/shared_state.h"

namespace lamina {

class SessionServiceImpl final
    : public v1::SessionService::WithCallbackMethod_KeepAlive<v1::SessionService::Service> {
 public:
  explicit SessionServiceImpl(SharedState& state) : state_(state) {}

  grpc::Status CreateSession(grpc::ServerContext* context, const v1::CreateSessionRequest* request,
                             v1::CreateSessionResponse* response) override;
  grpc::ServerBidiReactor<v1::KeepAliveRequest, v1::KeepAliveResponse>* KeepAlive(
      grpc::CallbackServerContext* context) override;
  grpc::Status DeleteSession(grpc::ServerContext* context, const v1::DeleteSessionRequest* request,
                             v1::DeleteSessionResponse* response) override;
  grpc::Status CreateRegion(grpc::ServerContext* context, const v1::CreateRegionRequest* request,
                            v1::CreateRegionResponse* response) override;
  grpc::Status ListRegions(grpc::ServerContext* context, const v1::ListRegionsRequest* request,
                           v1::ListRegionsResponse* response) override;
  grpc::Status ReleaseRegion(grpc::ServerContext* context, const v1::ReleaseRegionRequest* request,
                             v1::ReleaseRegionResponse* response) override;

 private:
  SharedState& state_;
};

}  // namespace lamina
