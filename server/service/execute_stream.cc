#include "server/service/execute_stream.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "server/service/layer_calls.h"

namespace lamina {
namespace {

using Stream = grpc::ServerReaderWriterInterface<v1::ExecuteResponse, v1::ExecuteRequest>;

// Forwards of a stream whose contexts can still be named; of more, the oldest can't.
constexpr size_t kNamedForwards = 1024;

// The contexts of a stream's Forwards, by their ids. The running thread's alone.
class NamedContexts {
 public:
  void Made(uint64_t id, std::string context) {
    if (contexts_.size() == kNamedForwards) contexts_.erase(contexts_.begin());
    contexts_[id] = std::move(context);
  }
  void Failed(uint64_t id) { Made(id, ""); }
  void Spent(uint64_t id) { contexts_.erase(id); }

  absl::StatusOr<std::string> Find(uint64_t id) const {
    const auto it = contexts_.find(id);
    if (it == contexts_.end())
      return absl::NotFoundError(
          absl::StrCat("context_of: ", id, " is no Forward of this stream that has a context"));
    if (it->second.empty())
      return absl::FailedPreconditionError(
          absl::StrCat("context_of: the Forward ", id, " has failed and left no context"));
    return it->second;
  }

 private:
  std::map<uint64_t, std::string> contexts_;  // empty: the Forward failed
};

// One call: from when it is read until it is answered.
struct Item {
  v1::ExecuteRequest request;
  absl::Time deadline = absl::InfiniteFuture();
  std::atomic<bool> cancelled{false};
};

class ExecuteStream {
 public:
  ExecuteStream(SharedState& state, const CallControl& control, Stream& stream)
      : state_(state), control_(control), stream_(stream) {}

  absl::Status Serve() {
    std::thread runner([this] { RunCalls(); });
    absl::Status status = ReadCalls();
    {
      std::lock_guard<std::mutex> lock(mutex_);
      all_read_ = true;
      // Nothing that came after a broken rule is to be trusted.
      if (!status.ok()) waiting_.clear();
    }
    changed_.notify_all();
    runner.join();
    return status;
  }

 private:
  absl::Status ReadCalls() {
    uint64_t last = 0;
    for (;;) {
      auto item = std::make_unique<Item>();
      if (!stream_.Read(&item->request)) return absl::OkStatus();
      const uint64_t id = item->request.id();
      if (id <= last)
        return absl::InvalidArgumentError(
            absl::StrCat("id: ", id, " must be above that of the message before, ", last));
      last = id;
      std::unique_lock<std::mutex> lock(mutex_);
      if (item->request.call_case() == v1::ExecuteRequest::kCancel) {
        for (const std::unique_ptr<Item>& other : waiting_)
          if (other->request.id() == item->request.cancel()) other->cancelled = true;
        continue;
      }
      item->deadline = control_.deadline;
      if (item->request.has_timeout_seconds() && item->request.timeout_seconds() > 0)
        item->deadline =
            std::min(item->deadline, absl::Now() + absl::Seconds(item->request.timeout_seconds()));
      changed_.wait(lock, [this] { return waiting_.size() < kExecuteStreamDepth || broken_; });
      if (broken_) return absl::OkStatus();
      waiting_.push_back(std::move(item));
      changed_.notify_all();
    }
  }

  void RunCalls() {
    for (;;) {
      std::unique_ptr<Item> item;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        changed_.wait(lock, [this] { return !waiting_.empty() || all_read_; });
        if (waiting_.empty()) return;
        item = std::move(waiting_.front());
        waiting_.pop_front();
        changed_.notify_all();
      }
      v1::ExecuteResponse response;
      response.set_id(item->request.id());
      const absl::Status status = Run(*item, &response);
      if (!status.ok()) {
        response.clear_result();
        response.set_code(static_cast<int32_t>(status.code()));
        response.set_message(std::string(status.message()));
      }
      if (!stream_.Write(response)) {
        std::lock_guard<std::mutex> lock(mutex_);
        broken_ = true;
        waiting_.clear();
        changed_.notify_all();
      }
    }
  }

  absl::Status Run(Item& item, v1::ExecuteResponse* response) {
    v1::ExecuteRequest& request = item.request;
    const uint64_t id = request.id();
    CallControl control;
    control.deadline = item.deadline;
    control.cancelled = [&] {
      return item.cancelled || (control_.cancelled && control_.cancelled());
    };
    const auto run = [&]() -> absl::Status {
      const double timeout = request.timeout_seconds();
      if (request.has_timeout_seconds() && !(timeout > 0))
        return absl::InvalidArgumentError(
            absl::StrCat("timeout_seconds: ", timeout, " must be above 0"));
      // Also of a call that the device has no part in.
      if (control.cancelled())
        return absl::CancelledError("cancelled before the call began; nothing has changed");
      switch (request.call_case()) {
        case v1::ExecuteRequest::kForward:
          if (absl::Status status = NoContextOf(request); !status.ok()) return status;
          return RunCall(state_, request.forward(), control, response->mutable_forward());
        case v1::ExecuteRequest::kBackward:
          return WithContext(request, *request.mutable_backward(), [&] {
            return RunCall(state_, request.backward(), control, response->mutable_backward());
          });
        case v1::ExecuteRequest::kApplyGradients:
          if (absl::Status status = NoContextOf(request); !status.ok()) return status;
          return RunCall(state_, request.apply_gradients(), control,
                         response->mutable_apply_gradients());
        case v1::ExecuteRequest::kZeroGradients:
          if (absl::Status status = NoContextOf(request); !status.ok()) return status;
          return RunCall(state_, request.zero_gradients(), control,
                         response->mutable_zero_gradients());
        case v1::ExecuteRequest::kReleaseContext:
          return WithContext(request, *request.mutable_release_context(), [&] {
            return RunCall(state_, request.release_context(), control,
                           response->mutable_release_context());
          });
        case v1::ExecuteRequest::kCancel:
        case v1::ExecuteRequest::CALL_NOT_SET:
          break;
      }
      return absl::InvalidArgumentError("call: is needed");
    };
    const absl::Status status = run();
    if (request.has_forward()) {
      if (!status.ok()) {
        contexts_.Failed(id);
      } else if (!response->forward().context_id().empty()) {
        contexts_.Made(id, response->forward().context_id());
      }
    }
    return status;
  }

  static absl::Status NoContextOf(const v1::ExecuteRequest& request) {
    if (request.context_of() == 0) return absl::OkStatus();
    return absl::InvalidArgumentError(
        absl::StrCat("context_of: ", request.context_of(),
                     " must be 0 with a call other than backward and release_context"));
  }

  // Runs a call that ends a context, after filling in the one that context_of names.
  template <typename Request, typename RunIt>
  absl::Status WithContext(const v1::ExecuteRequest& item, Request& request, RunIt run_it) {
    const uint64_t named = item.context_of();
    if (named == 0) return run_it();
    if (!request.context_id().empty())
      return absl::InvalidArgumentError("context_of: must be 0 where there is a context_id");
    absl::StatusOr<std::string> context = contexts_.Find(named);
    if (!context.ok()) return context.status();
    request.set_context_id(*std::move(context));
    const absl::Status status = run_it();
    if (status.ok()) contexts_.Spent(named);
    return status;
  }

  SharedState& state_;
  const CallControl& control_;
  Stream& stream_;
  NamedContexts contexts_;

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::unique_ptr<Item>> waiting_;  // guarded by mutex_
  bool all_read_ = false;                      // guarded by mutex_
  bool broken_ = false;                        // guarded by mutex_: nobody hears answers any more
};

}  // namespace

absl::Status RunExecuteStream(SharedState& state, const CallControl& control, Stream& stream) {
  return ExecuteStream(state, control, stream).Serve();
}

}  // namespace lamina
