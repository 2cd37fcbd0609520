#include "src/keeper.h"

#include <condition_variable>
#include <mutex>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "src/connection.h"

namespace lamina::client::internal {
namespace {

class StreamKeeper : public Keeper {
 public:
  explicit StreamKeeper(Args args) : args_(std::move(args)) {
    thread_ = std::thread([this] { Run(); });
  }

  ~StreamKeeper() override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stopping_ = true;
    }
    changed_.notify_all();
    context_.TryCancel();  // wakes a blocked Read
    thread_.join();
  }

  absl::Status status() const override {
    std::lock_guard<std::mutex> lock(mutex_);
    return status_;
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
  void Run() {
    auto stream = args_.connection->sessions().KeepAlive(&context_);
    // A read is always pending, so that a stream that breaks between two beats is noticed at once.
    std::thread reader([this, &stream] {
      pb::KeepAliveResponse response;
      while (stream->Read(&response)) Note(&bound_);
      Note(&broken_);
    });
    pb::KeepAliveRequest request;
    request.set_session_id(args_.session_id);
    while (stream->Write(request)) {
      std::unique_lock<std::mutex> lock(mutex_);
      if (changed_.wait_for(lock, args_.lease / 3, [this] { return stopping_ || broken_; })) break;
    }
    stream->WritesDone();
    reader.join();
    const grpc::Status end = stream->Finish();
    std::lock_guard<std::mutex> lock(mutex_);
    ended_ = true;
    if (!stopping_) {
      status_ = end.ok() ? absl::UnavailableError("the daemon ended the session")
                         : ToAbsl(end, args_.connection->target());
    }
    changed_.notify_all();
  }

  void Note(bool* what) {
    std::lock_guard<std::mutex> lock(mutex_);
    *what = true;
    changed_.notify_all();
  }

  const Args args_;
  grpc::ClientContext context_;  // no deadline: the stream lives as long as the session
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  bool bound_ = false;     // guarded by mutex_: the daemon has answered
  bool broken_ = false;    // guarded by mutex_: nothing can be read any more
  bool stopping_ = false;  // guarded by mutex_
  bool ended_ = false;     // guarded by mutex_: status_ is final
  absl::Status status_;    // guarded by mutex_
  std::thread thread_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Keeper>> Keeper::Start(Args args) {
  auto keeper = std::make_unique<StreamKeeper>(std::move(args));
  if (absl::Status status = keeper->WaitUntilBound(); !status.ok()) return status;
  return keeper;
}

}  // namespace lamina::client::internal
