#include "server/service/session_service.h"

#include <grpcpp/alarm.h>
#include <spdlog/spdlog.h>

#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "server/service/admission.h"
#include "server/service/status.h"

namespace lamina {
namespace {

// One KeepAlive stream. The session's end, however it comes, is its end. Its own end is the
// session's, or leaves that adrift where it broke and the session has a grace.
//
// Whether it broke is known for certain only when it is done: a read fails alike when the client
// has sent its last message and when the client is gone, but only the former hears the status.
//
// Threads: gRPC runs the On... methods one after another; Close may come from any thread at any
// time, so who wants to do that holds a Link, which knows whether the stream is still there.
class Keeper final : public grpc::ServerBidiReactor<v1::KeepAliveRequest, v1::KeepAliveResponse> {
 public:
  Keeper(SharedState& state, grpc::CallbackServerContext& context)
      : state_(state),
        context_(context),
        caller_(CallerOf(state.access, &context)),
        link_(std::make_shared<Link>()) {
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
      Close(*link_, absl::OkStatus());
      return;
    }
    if (session_id_.empty()) {
      if (absl::Status status = Bind(); !status.ok()) {
        Close(*link_, status);
        return;
      }
    } else if (!request_.session_id().empty() && request_.session_id() != session_id_) {
      state_.sessions.UnbindKeeper(session_id_, keeper_, "protocol_error");
      Close(*link_, absl::InvalidArgumentError("session_id: a KeepAlive stream keeps one session"));
      return;
    }
    auto session = state_.sessions.Find(session_id_, caller_);
    if (!session.ok()) {
      Close(*link_, absl::DeadlineExceededError(kSilent));  // the reaper was faster
      return;
    }
    response_.set_applied_sequence(state_.mutations.For((*session)->key())->applied());
    StartWrite(&response_);
  }

  void OnWriteDone(bool ok) override {
    if (ok) {
      StartRead(&request_);  // fails where the stream was closed meanwhile
    } else {
      Close(*link_, absl::OkStatus());
    }
  }

  void OnCancel() override {}  // reads and writes fail then

  void OnDone() override {
    if (!session_id_.empty()) Leave();
    delete this;
  }

 private:
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

  static absl::Status StatusOfLoss(const std::string& reason) {
    if (reason == "deleted") return absl::OkStatus();  // in order: no failed call to count or log
    if (reason == "taken_over")
      return absl::AbortedError("another KeepAlive stream of the session took over from this one");
    return absl::DeadlineExceededError(kSilent);
  }

  absl::Status Bind() {
    auto lost = [link = link_](const std::string& reason) { Close(*link, StatusOfLoss(reason)); };
    auto keeping = state_.sessions.BindKeeper(request_.session_id(), std::move(lost), caller_);
    if (!keeping.ok()) return keeping.status();
    session_id_ = request_.session_id();
    keeper_ = keeping->keeper;
    session_key_ = keeping->session->key();
    first_message_.Cancel();
    if (keeping->arrival != SessionManager::Arrival::kFirst) {
      const bool took_over = keeping->arrival == SessionManager::Arrival::kTookOver;
      state_.metrics.SessionResumed(took_over ? Resumption::kTakeover : Resumption::kBreak);
      spdlog::info("event=session_resumed session={} after={} adrift_seconds={:.3f}", session_key_,
                   took_over ? "takeover" : "break", absl::ToDoubleSeconds(keeping->adrift));
    }
    return absl::OkStatus();
  }

  // What the stream's end means for its session. Nothing where that has ended, or was taken over.
  void Leave() {
    if (state_.gate.closed()) {
      // At the daemon's end it is gRPC that cuts the streams, and nobody comes back.
      state_.sessions.UnbindKeeper(session_id_, keeper_, "shutdown");
    } else if (!context_.IsCancelled()) {
      state_.sessions.UnbindKeeper(session_id_, keeper_, "keep_alive_closed");
    } else if (state_.sessions.BreakKeeper(session_id_, keeper_)) {
      spdlog::info("event=keep_alive_broken session={}", session_key_);
    }
  }

  SharedState& state_;
  const grpc::CallbackServerContext& context_;  // lives until OnDone has returned
  const std::string caller_;
  const std::shared_ptr<Link> link_;
  grpc::Alarm first_message_;
  std::string session_id_;  // empty until the first message named it
  uint64_t keeper_ = 0;     // from then on: this stream's number there
  uint64_t session_key_ = 0;
  v1::KeepAliveRequest request_;
  v1::KeepAliveResponse response_;
};

}  // namespace

grpc::ServerBidiReactor<v1::KeepAliveRequest, v1::KeepAliveResponse>* SessionServiceImpl::KeepAlive(
    grpc::CallbackServerContext* context) {
  return new Keeper(state_, *context);  // deletes itself in OnDone
}

}  // namespace lamina
