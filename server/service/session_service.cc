#include "server/service/session_service.h"

#include <grpcpp/alarm.h>
#include <spdlog/spdlog.h>

#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "server/service/status.h"

namespace lamina {
namespace {

void Fill(const Region& region, v1::Region* out) {
  out->set_region_id(region.id());
  out->set_kind(v1::REGION_KIND_MEMFD);
  out->set_length_bytes(region.length());
  out->set_registered(region.registered());
}

// One KeepAlive stream. Its end is the session's end, and the session's end, however it comes, is
// its end.
//
// Threads: gRPC runs the On... methods one after another; Close may come from any thread at any
// time, so who wants to do that holds a Link, which knows whether the stream is still there.
class Keeper final : public grpc::ServerBidiReactor<v1::KeepAliveRequest, v1::KeepAliveResponse> {
 public:
  explicit Keeper(SharedState& state) : state_(state), link_(std::make_shared<Link>()) {
    link_->keeper = this;
    // A client that opens a stream must say whose it is, or the stream would stay for ever.
    first_message_.Set(absl::ToChronoTime(absl::Now() + state_.sessions.options().lease),
                       [link = link_](bool rang) {
                         if (rang) Close(*link, absl::DeadlineExceededError(kSilent));
                       });
    StartRead(&request_);
  }

  void OnReadDone(bool ok) override {
    if (!ok) {
      // The client closed its side, or is gone, or this side has finished.
      Leave(kClosed, absl::OkStatus());
      return;
    }
    if (session_id_.empty()) {
      if (absl::Status status = Bind(); !status.ok()) {
        Leave("", status);
        return;
      }
    } else if (!request_.session_id().empty() && request_.session_id() != session_id_) {
      Leave("protocol_error",
            absl::InvalidArgumentError("session_id: a KeepAlive stream keeps one session"));
      return;
    }
    auto session = state_.sessions.Find(session_id_);
    if (!session.ok()) {
      Leave("", absl::DeadlineExceededError(kSilent));  // the reaper was faster
      return;
    }
    response_.set_applied_sequence(state_.mutations.For((*session)->key())->applied());
    StartWrite(&response_);
  }

  void OnWriteDone(bool ok) override {
    if (ok) {
      StartRead(&request_);  // fails where the stream was closed meanwhile
    } else {
      Leave(kClosed, absl::OkStatus());
    }
  }

  void OnCancel() override {}  // reads and writes fail then

  void OnDone() override { delete this; }

 private:
  static constexpr const char* kClosed = "keep_alive_closed";
  static constexpr const char* kSilent =
      "the session's lease has ended: no message for lease_seconds";

  struct Link {
    std::mutex mutex;
    Keeper* keeper = nullptr;  // guarded by mutex; null: finished
  };

  // Finishes the stream, once.
  static void Close(Link& link, const absl::Status& status) {
    Keeper* keeper = nullptr;
    {
      std::lock_guard<std::mutex> lock(link.mutex);
      keeper = std::exchange(link.keeper, nullptr);
    }
    // It is there until it has finished, and only who took it from the link makes it finish.
    if (keeper != nullptr) keeper->Finish(ToGrpc(status));
  }

  absl::Status Bind() {
    auto lost = [link = link_](const std::string& reason) {
      Close(*link, reason == "deleted" ? absl::NotFoundError("session_id: the session was deleted")
                                       : absl::DeadlineExceededError(kSilent));
    };
    absl::Status status = state_.sessions.BindKeeper(request_.session_id(), std::move(lost));
    if (!status.ok()) return status;
    session_id_ = request_.session_id();
    first_message_.Cancel();
    return status;
  }

  void Leave(const std::string& reason, const absl::Status& status) {
    if (!session_id_.empty()) {
      // At the daemon's end it is gRPC that cuts the streams.
      state_.sessions.UnbindKeeper(session_id_, state_.gate.closed() ? "shutdown" : reason);
    }
    Close(*link_, status);
  }

  SharedState& state_;
  const std::shared_ptr<Link> link_;
  grpc::Alarm first_message_;
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
               absl::CEscape(opened->session->client_name()));
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
      return ToGrpc(absl::UnimplementedError(
          "kind: REGION_KIND_DEVICE is not offered by this version; use MEMFD"));
    default:
      return ToGrpc(absl::InvalidArgumentError(
          absl::StrCat("kind: ", static_cast<int>(request->kind()), " must be REGION_KIND_MEMFD")));
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
