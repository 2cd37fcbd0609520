#include "server/service/session_service.h"

#include <spdlog/spdlog.h>

#include <memory>
#include <string>

#include "server/service/status.h"

namespace lamina {
namespace {

void Fill(const Region& region, v1::Region* out) {
  out->set_region_id(region.id());
  out->set_kind(v1::REGION_KIND_MEMFD);
  out->set_length_bytes(region.length());
  out->set_registered(region.registered());
}

// One KeepAlive stream. Its end is the session's end. gRPC runs a reactor's methods one after
// another.
class Keeper final : public grpc::ServerBidiReactor<v1::KeepAliveRequest, v1::KeepAliveResponse> {
 public:
  explicit Keeper(SharedState& state) : state_(state) { StartRead(&request_); }

  void OnReadDone(bool ok) override {
    if (!ok) {
      // The client closed its side, or is gone.
      Leave("client_closed", grpc::Status::OK);
      return;
    }
    if (session_id_.empty()) {
      if (absl::Status status = state_.sessions.BindKeeper(request_.session_id()); !status.ok()) {
        Leave("", ToGrpc(status));
        return;
      }
      session_id_ = request_.session_id();
    } else if (!request_.session_id().empty() && request_.session_id() != session_id_) {
      Leave("protocol_error", grpc::Status(grpc::StatusCode::INVALID_ARGUMENT,
                                           "session_id: a KeepAlive stream keeps one session"));
      return;
    }
    auto session = state_.sessions.Find(session_id_);
    if (!session.ok()) {
      // The reaper was faster: silence for a whole lease, or somebody deleted it.
      session_id_.clear();
      Leave("", grpc::Status(grpc::StatusCode::DEADLINE_EXCEEDED,
                             "the session has ended: no message for lease_seconds, or deleted"));
      return;
    }
    response_.set_applied_sequence(state_.mutations.For((*session)->key())->applied());
    StartWrite(&response_);
  }

  void OnWriteDone(bool ok) override {
    if (ok) {
      StartRead(&request_);
    } else {
      Leave("client_lost", grpc::Status::OK);
    }
  }

  void OnCancel() override {}  // reads and writes fail then

  void OnDone() override { delete this; }

 private:
  void Leave(const std::string& reason, const grpc::Status& status) {
    if (!session_id_.empty()) {
      state_.sessions.UnbindKeeper(session_id_, reason);
      session_id_.clear();
    }
    Finish(status);
  }

  SharedState& state_;
  std::string session_id_;  // empty until the first message named it
  v1::KeepAliveRequest request_;
  v1::KeepAliveResponse response_;
};

}  // namespace

grpc::Status SessionServiceImpl::CreateSession(grpc::ServerContext*,
                                               const v1::CreateSessionRequest* request,
                                               v1::CreateSessionResponse* response) {
  const Gate::Pass pass(state_.gate);
  if (!pass.status().ok()) return ToGrpc(pass.status());
  auto opened = state_.sessions.Open(request->client_name());
  if (!opened.ok()) return ToGrpc(opened.status());
  const SessionOptions& options = state_.sessions.options();
  response->set_session_id(opened->id);
  response->set_lease_seconds(absl::ToDoubleSeconds(options.lease));
  response->set_broker_path(state_.broker_path);
  response->set_region_cap_bytes(options.region_cap_bytes);
  response->set_region_cap(options.region_cap);
  spdlog::info("event=session_opened session={} client=\"{}\"", opened->session->key(),
               opened->session->client_name());
  return grpc::Status::OK;
}

grpc::ServerBidiReactor<v1::KeepAliveRequest, v1::KeepAliveResponse>* SessionServiceImpl::KeepAlive(
    grpc::CallbackServerContext*) {
  return new Keeper(state_);  // deletes itself in OnDone
}

grpc::Status SessionServiceImpl::DeleteSession(grpc::ServerContext*,
                                               const v1::DeleteSessionRequest* request,
                                               v1::DeleteSessionResponse*) {
  return ToGrpc(state_.sessions.Delete(request->session_id()));
}

grpc::Status SessionServiceImpl::CreateRegion(grpc::ServerContext*,
                                              const v1::CreateRegionRequest* request,
                                              v1::CreateRegionResponse* response) {
  const Gate::Pass pass(state_.gate);
  if (!pass.status().ok()) return ToGrpc(pass.status());
  auto session = state_.sessions.Find(request->session_id());
  if (!session.ok()) return ToGrpc(session.status());
  switch (request->kind()) {
    case v1::REGION_KIND_UNSPECIFIED:
    case v1::REGION_KIND_MEMFD:
      break;
    case v1::REGION_KIND_DEVICE:
      return grpc::Status(grpc::StatusCode::UNIMPLEMENTED,
                          "kind: REGION_KIND_DEVICE is not offered by this version; use MEMFD");
    default:
      return grpc::Status(
          grpc::StatusCode::INVALID_ARGUMENT,
          "kind: " + std::to_string(static_cast<int>(request->kind())) + " is no region kind");
  }
  auto region = (*session)->CreateRegion(request->size_bytes());
  if (!region.ok()) return ToGrpc(region.status());
  Fill(**region, response->mutable_region());
  return grpc::Status::OK;
}

grpc::Status SessionServiceImpl::ListRegions(grpc::ServerContext*,
                                             const v1::ListRegionsRequest* request,
                                             v1::ListRegionsResponse* response) {
  const Gate::Pass pass(state_.gate);
  if (!pass.status().ok()) return ToGrpc(pass.status());
  auto session = state_.sessions.Find(request->session_id());
  if (!session.ok()) return ToGrpc(session.status());
  for (const auto& region : (*session)->ListRegions()) Fill(*region, response->add_regions());
  return grpc::Status::OK;
}

grpc::Status SessionServiceImpl::ReleaseRegion(grpc::ServerContext*,
                                               const v1::ReleaseRegionRequest* request,
                                               v1::ReleaseRegionResponse*) {
  auto session = state_.sessions.Find(request->session_id());
  if (!session.ok()) return ToGrpc(session.status());
  return ToGrpc((*session)->ReleaseRegion(request->region_id()));
}

}  // namespace lamina
