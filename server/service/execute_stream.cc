#include "server/service/execute_stream.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "server/service/calls.h"
#include "server/service/layer_calls.h"
#include "server/service/serve.h"
#include "server/service/tensors.h"

namespace lamina {
namespace {

// Forwards of a stream whose contexts can still be named; of more, the oldest can't.
constexpr size_t kNamedForwards = 1024;

// The contexts of a stream's Forwards, by their ids. Whoever runs the stream's calls has it alone.
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

// Never the same twice.
uint64_t NewTicket() {
  static std::atomic<uint64_t> last{0};
  return ++last;
}

// One call: from when it is read until it is answered.
struct Item {
  v1::ExecuteRequest request;
  uint64_t ticket = NewTicket();  // CallControl's
  absl::Time deadline = absl::InfiniteFuture();
  std::atomic<bool> cancelled{false};
};

// A call that was run, or of which the device still runs what it left, and its answer so far.
struct Flying {
  v1::ExecuteResponse response;
  Left left;
  std::unique_ptr<Gate::Pass> pass;  // a daemon that ends waits for it
};

// One stream. Its calls are run one after another, by one thread at a time: by gRPC's own where a
// call takes no time to speak of, else by one that may wait. Where the device works beside its
// thread, a call may leave work to it, and the next is run meanwhile: it is enqueued behind. What
// is left is waited for by a thread of its own, the lander, which gives the answers on their way,
// in order.
//
// Threads: gRPC runs OnReadDone's one after another, and so OnWriteDone's, but both, a runner and
// the lander at a time. What is to be done next is decided with mutex_ held, in Decide, and done
// without it: an operation of gRPC's may call back before it returns.
class ExecuteStream final
    : public grpc::ServerBidiReactor<v1::ExecuteRequest, v1::ExecuteResponse> {
 public:
  ExecuteStream(SharedState& state, Workers& workers, grpc::CallbackServerContext* context)
      : state_(state), workers_(workers), control_(ControlOf(state, context)) {
    std::unique_lock<std::mutex> lock(mutex_);
    Do(lock, Decide());
  }

  void OnReadDone(bool ok) override {
    std::unique_lock<std::mutex> lock(mutex_);
    reading_ = false;
    if (!ok) {
      all_read_ = true;
    } else if (const uint64_t id = read_->request.id(); id <= last_id_) {
      end_ = absl::InvalidArgumentError(
          absl::StrCat("id: ", id, " must be above that of the message before, ", last_id_));
      all_read_ = true;
      waiting_.clear();  // nothing that came after a broken rule is to be trusted
    } else {
      last_id_ = id;
      Take(std::move(read_));
    }
    Do(lock, Decide());
  }

  void OnWriteDone(bool ok) override {
    std::unique_lock<std::mutex> lock(mutex_);
    writing_ = false;
    unsent_.pop_front();
    if (!ok) {  // nobody hears answers any more
      broken_ = true;
      waiting_.clear();
      unsent_.clear();
    }
    Do(lock, Decide());
  }

  void OnCancel() override {}  // reads and writes fail then

  void OnDone() override { delete this; }

 private:
  // On whose thread calls are run.
  enum class Place : uint8_t {
    kGrpc,    // waits for nothing
    kDevice,  // has the device's turn, as long as nobody else wants it; waits for nothing
    kWorker,  // may wait
  };

  struct Next {
    bool read = false, write = false, run = false, finish = false;
  };

  // Needs mutex_.
  void Take(std::unique_ptr<Item> item) {
    if (item->request.call_case() == v1::ExecuteRequest::kCancel) {
      const uint64_t id = item->request.cancel();
      if (now_ != nullptr && now_->request.id() == id) now_->cancelled = true;
      for (const std::unique_ptr<Item>& other : waiting_)
        if (other->request.id() == id) other->cancelled = true;
      return;
    }
    item->deadline = control_.deadline;
    if (item->request.has_timeout_seconds() && item->request.timeout_seconds() > 0)
      item->deadline =
          std::min(item->deadline, absl::Now() + absl::Seconds(item->request.timeout_seconds()));
    if (!broken_) waiting_.push_back(std::move(item));
  }

  // What is to be done in the state that the stream is in; marks it as begun. Needs mutex_.
  Next Decide() {
    Next next;
    if (!running_ && MayRun()) next.run = running_ = true;
    // Who is about to run a call reads on when it knows how long that takes.
    if (!next.run && !reading_ && !all_read_ && waiting_.size() < kExecuteStreamDepth) {
      read_ = std::make_unique<Item>();
      next.read = reading_ = true;
    }
    if (!writing_ && !unsent_.empty()) next.write = writing_ = true;
    if (!finished_ && all_read_ && !reading_ && !writing_ && !running_ && !landing_ &&
        waiting_.empty() && unsent_.empty())
      next.finish = finished_ = true;
    return next;
  }

  // Whether there is a call to run, and it may be. Needs mutex_.
  bool MayRun() const {
    return !waiting_.empty() && flying_.size() < kExecuteInFlight &&
           unsent_.size() + flying_.size() < kExecuteUnsentAnswers;
  }

  // Does it. Whatever it begins may end on another thread before this returns, and the stream with
  // it: but for what it has begun itself, nothing of the stream may be touched afterwards.
  void Do(std::unique_lock<std::mutex>& lock, const Next& next) {
    v1::ExecuteRequest* const request = next.read ? &read_->request : nullptr;
    const v1::ExecuteResponse* const response = next.write ? &unsent_.front() : nullptr;
    const absl::Status end = next.finish ? end_ : absl::OkStatus();
    lock.unlock();
    if (next.finish) return Finish(ToGrpc(end));
    if (next.write) StartWrite(response);
    if (next.read) StartRead(request);
    if (next.run) RunCalls(Place::kGrpc);
  }

  // Runs what waits, as long as there is something and its answers are taken; running_ is this
  // thread's. It goes on on another one where a call may not be run on this.
  void RunCalls(Place place) {
    std::unique_lock<std::mutex> lock(mutex_);
    while (now_ != nullptr || MayRun()) {
      if (now_ == nullptr) {
        now_ = std::move(waiting_.front());
        waiting_.pop_front();
      }
      // gRPC's thread first runs what it can: that may be all, and over sooner than a read is
      // begun.
      if (place == Place::kGrpc && unsent_.empty()) {
        lock.unlock();
      } else {
        Do(lock, Decide());
      }
      Flying call;
      call.response.set_id(now_->request.id());
      absl::Status status = Guarded([&] {
        if (place != Place::kGrpc && state_.engine.WorksBeside())
          call.pass = std::make_unique<Gate::Pass>(state_.gate);
        return Run(*now_, place, call);
      });
      if (IsNotNow(status)) {
        GoOnElsewhere(place);
        return;
      }
      if (!status.ok()) {
        // It may have failed when the device had its work already.
        if (call.left.step != nullptr) (void)call.left.step->Wait();
        call.left = {};
        SetError(status, call.response);
      }
      lock.lock();
      now_ = nullptr;
      if (call.left.step != nullptr || landing_) {
        flying_.push_back(std::move(call));
        if (!landing_) {
          landing_ = true;
          workers_.Run([this] { Land(); });
        }
      } else if (!broken_) {
        unsent_.push_back(std::move(call.response));
      }
    }
    running_ = false;
    Do(lock, Decide());
  }

  // Waits for what calls have left, one after another, and answers them; landing_ is this thread's.
  void Land() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (!flying_.empty()) {
      Flying& call = flying_.front();
      if (call.left.step != nullptr) {
        lock.unlock();
        const absl::Status status = Guarded([&] { return End(call); });
        if (!status.ok()) SetError(status, call.response);
        lock.lock();
      }
      if (!broken_) unsent_.push_back(std::move(call.response));
      flying_.pop_front();
      if (flying_.empty()) break;
      Do(lock, Decide());
      lock.lock();
    }
    landing_ = false;
    Do(lock, Decide());
  }

  static absl::Status End(Flying& call) {
    return call.response.has_forward() ? EndLeft(call.left, call.response.mutable_forward())
                                       : EndLeft(call.left, call.response.mutable_backward());
  }

  void SetError(const absl::Status& status, v1::ExecuteResponse& response) const {
    response.clear_result();
    response.set_code(static_cast<int32_t>(status.code()));
    response.set_message(std::string(status.message()));
    CallControl whose = control_;
    whose.request_item = response.id();
    response.set_request_id(RequestIdOf(whose));
    LogFailure("/lamina.v1.LayerService/Execute", status.code(), status.message(), whose);
  }

  // Has now_ run where it can be: on the device's own thread, if that is idle, else on a worker.
  void GoOnElsewhere(Place place) {
    const auto on_device = [this] { RunCalls(Place::kDevice); };
    if (place != Place::kDevice && IsShort(now_->request) && state_.engine.TryPost(on_device))
      return;
    workers_.Run([this] { RunCalls(Place::kWorker); });
  }

  static bool IsShort(const v1::ExecuteRequest& request) {
    switch (request.call_case()) {
      case v1::ExecuteRequest::kForward:
        return lamina::IsShort(request.forward());
      case v1::ExecuteRequest::kBackward:
        return lamina::IsShort(request.backward());
      default:
        return true;  // no tensors
    }
  }

  // NotNow: it can't be run in this place. Nothing has changed then.
  absl::Status Run(Item& item, Place place, Flying& call) {
    v1::ExecuteRequest& request = item.request;
    v1::ExecuteResponse* const response = &call.response;
    const uint64_t id = request.id();
    CallControl control;
    control.deadline = item.deadline;
    control.has_turn = place == Place::kDevice;
    if (place != Place::kGrpc && state_.engine.WorksBeside()) {
      control.ticket = item.ticket;
      control.next = InputOfNext();
      control.left = &call.left;
    }
    control.caller = control_.caller;
    control.request_id = control_.request_id;
    control.request_item = id;
    control.trace_id = control_.trace_id;
    control.span_id = control_.span_id;
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
          return Begin(request.forward(), control, place, response->mutable_forward());
        case v1::ExecuteRequest::kBackward:
          return WithContext(request, *request.mutable_backward(), [&] {
            return Begin(request.backward(), control, place, response->mutable_backward());
          });
        case v1::ExecuteRequest::kApplyGradients:
          if (absl::Status status = NoContextOf(request); !status.ok()) return status;
          return Begin(request.apply_gradients(), control, place,
                       response->mutable_apply_gradients());
        case v1::ExecuteRequest::kZeroGradients:
          if (absl::Status status = NoContextOf(request); !status.ok()) return status;
          return Begin(request.zero_gradients(), control, place,
                       response->mutable_zero_gradients());
        case v1::ExecuteRequest::kReleaseContext:
          return WithContext(request, *request.mutable_release_context(), [&] {
            return Begin(request.release_context(), control, place,
                         response->mutable_release_context());
          });
        case v1::ExecuteRequest::kCancel:
        case v1::ExecuteRequest::CALL_NOT_SET:
          break;
      }
      return absl::InvalidArgumentError("call: is needed");
    };
    const absl::Status status = run();
    if (request.has_forward() && !IsNotNow(status)) {
      if (!status.ok()) {
        contexts_.Failed(id);
      } else if (!response->forward().context_id().empty()) {
        contexts_.Made(id, response->forward().context_id());
      }
    }
    return status;
  }

  // The input of the call that waits behind the one that runs, if it lies in host memory that the
  // client has filled.
  NextInput InputOfNext() {
    NextInput next;
    std::string session_id;
    v1::Tensor input;
    const char* field = "input";
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (waiting_.empty() || waiting_.front()->cancelled) return {};
      const v1::ExecuteRequest& request = waiting_.front()->request;
      if (request.has_forward() && !request.forward().has_ready()) {
        next.stack = request.forward().stack();
        session_id = request.forward().session_id();
        input = request.forward().input();
      } else if (request.has_backward() && !request.backward().has_ready()) {
        next.stack = request.backward().stack();
        session_id = request.backward().mutation().session_id();
        input = request.backward().output_grad();
        field = "output_grad";
      }
      if (!input.has_slice()) return {};
      next.ticket = waiting_.front()->ticket;
    }
    const auto session = state_.sessions.Find(session_id, control_.caller);
    if (!session.ok()) return {};
    auto resolved = ResolveInput(field, input, state_.engine.options().inline_cap_bytes, **session);
    if (!resolved.ok() || resolved->memory != Memory::kHost) return {};  // the call says why
    next.input = *std::move(resolved);
    return next;
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
    if (IsNotNow(status)) request.clear_context_id();  // as it came, for the next time
    return status;
  }

  template <typename Request, typename Response>
  absl::Status Begin(const Request& request, const CallControl& control, Place place,
                     Response* response) {
    if (place == Place::kDevice) {
      // Others who wait for the device, and what is long, go before the rest of this stream.
      if (state_.engine.TurnIsWanted() || !lamina::IsShort(request)) return NotNow();
      return RunCall(state_, request, control, response);
    }
    absl::Status status;
    if (TryCall(state_, request, control, response, &status)) return status;
    return place == Place::kWorker ? RunCall(state_, request, control, response) : NotNow();
  }

  SharedState& state_;
  Workers& workers_;
  const CallControl control_;
  NamedContexts contexts_;

  std::mutex mutex_;
  std::unique_ptr<Item> read_;                 // guarded by mutex_: what is being read
  std::deque<std::unique_ptr<Item>> waiting_;  // guarded by mutex_
  std::unique_ptr<Item> now_;                  // set with mutex_ held, by the runner, whose it is
  std::deque<Flying> flying_;                  // guarded by mutex_; the first is the lander's
  std::deque<v1::ExecuteResponse> unsent_;     // guarded by mutex_; the first is being written
  uint64_t last_id_ = 0;                       // guarded by mutex_
  absl::Status end_;                           // guarded by mutex_: the stream's own
  bool reading_ = false;                       // guarded by mutex_
  bool writing_ = false;                       // guarded by mutex_
  bool running_ = false;                       // guarded by mutex_: some thread runs calls
  bool landing_ = false;                       // guarded by mutex_: some thread waits for flying_
  bool all_read_ = false;                      // guarded by mutex_
  bool broken_ = false;                        // guarded by mutex_: nobody hears answers any more
  bool finished_ = false;                      // guarded by mutex_
};

}  // namespace

grpc::ServerBidiReactor<v1::ExecuteRequest, v1::ExecuteResponse>* NewExecuteStream(
    SharedState& state, Workers& workers, grpc::CallbackServerContext* context) {
  return new ExecuteStream(state, workers, context);
}

}  // namespace lamina
