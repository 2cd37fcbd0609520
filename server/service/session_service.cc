#include "server/service/session_service.h"

#include <grpcpp/alarm.h>

#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "server/service/status.h"

namespace lamina {
namespace {

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

grpc::ServerBidiReactor<v1::KeepAliveRequest, v1::KeepAliveResponse>* SessionServiceImpl::KeepAlive(
    grpc::CallbackServerContext*) {
  return new Keeper(state_);  // deletes itself in OnDone
}

}  // namespace lamina
