#include "src/keeper.h"

#include <algorithm>
#include <condition_variable>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "src/connection.h"

namespace lamina::client::internal {
namespace {

using Seconds = std::chrono::duration<double>;

// What is on the way may forget a connection that is silent for longer.
constexpr Seconds kLongestBeat{10};
constexpr Milliseconds kFirstPause{20}, kLongestPause{1000};
// How long to wait for a connection before looking whether it is still wanted.
constexpr Milliseconds kLook{100};
// The answer to a stream's first message may be late, but not for ever.
constexpr std::chrono::seconds kSlowestAnswer{60};

// Whether the stream broke; any other end is the daemon's own word about the session.
bool Broke(const grpc::Status& end) {
  switch (end.error_code()) {
    case grpc::StatusCode::OK:  // not by us, and the session's end has a status
    case grpc::StatusCode::UNAVAILABLE:
    case grpc::StatusCode::UNKNOWN:
    case grpc::StatusCode::INTERNAL:
    case grpc::StatusCode::CANCELLED:
      return true;
    default:
      return false;
  }
}

class StreamKeeper : public Keeper {
 public:
  explicit StreamKeeper(Args args)
      : args_(std::move(args)), grace_(std::chrono::duration_cast<Clock::duration>(args_.grace)) {
    thread_ = std::thread([this] { Run(); });
  }
  ~StreamKeeper() override { StreamKeeper::Stop(); }

  void Stop() override {
    std::lock_guard<std::mutex> stopping(stop_mutex_);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stopping_ = true;
      if (context_ != nullptr) context_->TryCancel();  // wakes a blocked Read
    }
    changed_.notify_all();
    if (thread_.joinable()) thread_.join();
  }

  absl::Status status() const override {
    std::lock_guard<std::mutex> lock(mutex_);
    return status_;
  }

  bool held() const override {
    std::lock_guard<std::mutex> lock(mutex_);
    return held_;
  }

  uint64_t breaks() const override {
    std::lock_guard<std::mutex> lock(mutex_);
    return breaks_;
  }

  void Settle() const override {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait_for(lock, grace_ + kSlowestAnswer,
                      [this] { return held_ || ended_ || stopping_; });
  }

  absl::Status WaitUntilBound() {
    std::unique_lock<std::mutex> lock(mutex_);
    const auto settled = [this] { return bound_ || ended_; };
    if (args_.start_timeout.count() <= 0) {
      changed_.wait(lock, settled);
    } else if (!changed_.wait_for(lock, args_.start_timeout, settled)) {
      return absl::DeadlineExceededError("the daemon did not answer on the KeepAlive stream");
    }
    return status_;
  }

 private:
  struct Outcome {
    bool answered = false;
    grpc::Status end;
  };

  void Run() {
    std::optional<Clock::time_point> give_up;  // set once a stream has broken
    Milliseconds pause = kFirstPause;
    absl::Status broken;  // how the last stream ended that was answered
    for (;;) {
      if (give_up) WaitForConnection(*give_up);
      const Outcome outcome = Hold(give_up);
      std::unique_lock<std::mutex> lock(mutex_);
      ++breaks_;
      changed_.notify_all();
      if (stopping_) break;
      const absl::Status end = outcome.end.ok() ? absl::NotFoundError("the session was deleted")
                                                : ToAbsl(outcome.end, args_.connection->target());
      if (outcome.answered || !give_up) {
        give_up = Clock::now() + grace_;
        pause = kFirstPause;
        broken = end;
      }
      if (grace_ <= Clock::duration::zero() || !Broke(outcome.end)) {
        status_ = end;
        break;
      }
      if (Clock::now() >= *give_up) {
        status_ = absl::Status(
            broken.code(), absl::StrCat(broken.message(), "; the connection was not back within ",
                                        args_.grace.count(), " s"));
        break;
      }
      changed_.wait_until(lock, std::min(*give_up, Clock::now() + pause),
                          [this] { return stopping_; });
      pause = std::min(pause * 2, kLongestPause);
    }
    std::lock_guard<std::mutex> lock(mutex_);
    ended_ = true;
    changed_.notify_all();
  }

  // Calls that fail at once would let a new connection come about only while they fail.
  void WaitForConnection(Clock::time_point give_up) {
    while (
        Clock::now() < give_up && !stopping() &&
        !args_.connection->channel()->WaitForConnected(std::chrono::system_clock::now() + kLook)) {
    }
  }

  bool stopping() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return stopping_;
  }

  // One stream, from its first message to its end. Its first answer is waited for until `give_up`.
  Outcome Hold(std::optional<Clock::time_point> give_up) {
    grpc::ClientContext context;  // no deadline: the stream lives as long as the session
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (stopping_) return {};
      context_ = &context;
    }
    auto stream = args_.connection->sessions().KeepAlive(&context);
    bool answered = false, broken = false;  // guarded by mutex_
    // A read is always pending, so that a stream that breaks between two beats is noticed at once.
    std::thread reader([&] {
      pb::KeepAliveResponse response;
      while (stream->Read(&response)) {
        std::lock_guard<std::mutex> lock(mutex_);
        answered = held_ = bound_ = true;
        changed_.notify_all();
      }
      std::lock_guard<std::mutex> lock(mutex_);
      broken = true;
      held_ = false;
      changed_.notify_all();
    });
    pb::KeepAliveRequest request;
    request.set_session_id(args_.session_id);
    while (stream->Write(request)) {
      std::unique_lock<std::mutex> lock(mutex_);
      const auto gone = [&] { return stopping_ || broken; };
      if (give_up && !changed_.wait_until(lock, *give_up, [&] { return gone() || answered; })) {
        context.TryCancel();
        break;
      }
      if (changed_.wait_for(lock, std::min(args_.lease / 3, kLongestBeat), gone)) break;
    }
    stream->WritesDone();
    reader.join();
    Outcome outcome{.answered = answered, .end = stream->Finish()};
    std::lock_guard<std::mutex> lock(mutex_);
    context_ = nullptr;
    return outcome;
  }

  const Args args_;
  const Clock::duration grace_;
  std::mutex stop_mutex_;  // before mutex_: who joins the thread
  mutable std::mutex mutex_;
  mutable std::condition_variable changed_;
  grpc::ClientContext* context_ = nullptr;  // guarded by mutex_: the stream's, while there is one
  bool bound_ = false;                      // guarded by mutex_: the daemon has answered, ever
  bool held_ = false;                       // guarded by mutex_
  uint64_t breaks_ = 0;                     // guarded by mutex_
  bool stopping_ = false;                   // guarded by mutex_
  bool ended_ = false;                      // guarded by mutex_: status_ is final
  absl::Status status_;                     // guarded by mutex_
  std::thread thread_;
};

}  // namespace

absl::StatusOr<std::shared_ptr<Keeper>> Keeper::Start(Args args) {
  auto keeper = std::make_shared<StreamKeeper>(std::move(args));
  if (absl::Status status = keeper->WaitUntilBound(); !status.ok()) return status;
  return keeper;
}

}  // namespace lamina::client::internal
