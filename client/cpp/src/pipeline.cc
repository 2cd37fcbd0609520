#include "lamina/client/pipeline.h"

#include <deque>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "src/calls.h"
#include "src/session_core.h"

namespace lamina::client {

namespace internal {
namespace {

// Of the daemon's own depth, one is for a message that cancels.
constexpr int kDeepest = 63;

struct ForwardFlight : FlightOf<ForwardResult> {
  uint64_t id = 0;       // guarded by mutex, as all here
  bool keeps = false;    // a context: it is a training forward
  bool claimed = false;  // by a Backward, which gets the context
  Context context;       // the claimed one
};

template <class Result>
void Land(FlightOf<Result>& flight, absl::StatusOr<Result> result) {
  std::lock_guard<std::mutex> lock(flight.mutex);
  flight.result = std::move(result);
  flight.done = true;
  flight.changed.notify_all();
}

absl::Status Closed() { return absl::FailedPreconditionError("the pipeline is closed"); }

}  // namespace

// A call as it goes out, and what becomes of its answer.
struct Item {
  pb::ExecuteRequest request;
  pb::Mutation* mutation = nullptr;  // in the request; null: it changes nothing
  Flight* flight = nullptr;          // what `land` keeps
  bool cancelling = false;           // guarded by the pipeline's mutex_
  std::function<void(const absl::Status&, const pb::ExecuteResponse&)> land;
};

class PipelineCore : public std::enable_shared_from_this<PipelineCore> {
 public:
  PipelineCore(std::shared_ptr<SessionCore> session, const PipelineOptions& options)
      : session_(std::move(session)), depth_(static_cast<size_t>(options.depth)) {
    if (options.timeout.count() > 0)
      context_.set_deadline(std::chrono::system_clock::now() + options.timeout);
    stream_ = session_->connection().layers().Execute(&context_);
    reader_ = std::thread([this] { ReadAnswers(); });
  }

  ~PipelineCore() { Close(); }

  const SessionCore* session() const { return session_.get(); }

  // Sends it, or ends it with what is in the way.
  void Submit(std::unique_ptr<Item> item) {
    if (absl::Status status = Admit(item); !status.ok()) item->land(status, {});
  }

  bool Cancel(const Flight* flight) {
    std::lock_guard<std::mutex> sending(send_mutex_);
    pb::ExecuteRequest request;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      Item* found = nullptr;
      for (const std::unique_ptr<Item>& item : under_way_)
        if (item->flight == flight) found = item.get();
      if (found == nullptr || !over_.ok()) return false;
      if (std::exchange(found->cancelling, true) || closed_) return true;
      request.set_id(++last_id_);
      request.set_cancel(found->request.id());
    }
    stream_->Write(request);
    return true;
  }

  absl::Status Wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [this] { return under_way_.empty() && !landing_; });
    absl::Status failed = std::exchange(failed_, absl::OkStatus());
    return failed.ok() ? over_ : failed;
  }

  void Close() {
    std::lock_guard<std::mutex> closing(close_mutex_);
    if (!reader_.joinable()) return;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      closed_ = true;
    }
    changed_.notify_all();
    {
      std::lock_guard<std::mutex> sending(send_mutex_);
      stream_->WritesDone();
    }
    reader_.join();
  }

 private:
  // On success the item is the pipeline's.
  absl::Status Admit(std::unique_ptr<Item>& item) {
    std::lock_guard<std::mutex> submitting(submit_mutex_);  // one after another, as they are sent
    const bool mutation = item->mutation != nullptr;
    {
      std::unique_lock<std::mutex> lock(mutex_);
      changed_.wait(lock, [this] { return under_way_.size() < depth_ || closed_ || !over_.ok(); });
      if (absl::Status refusal = Refusal(mutation); !refusal.ok()) return refusal;
    }
    if (mutation) {
      if (absl::Status status = TakeTurn(); !status.ok()) return status;
    }
    std::lock_guard<std::mutex> sending(send_mutex_);
    const pb::ExecuteRequest* request = nullptr;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      // What has changed while the turn was waited for. Each mutation under way has its own part in
      // the turn, this one too.
      absl::Status refusal = Refusal(mutation);
      if (!refusal.ok()) {
        if (mutation) GiveBack();
        return refusal;
      }
      if (mutation) {
        item->mutation->set_session_id(session_->id());
        item->mutation->set_sequence(next_sequence_++);
      }
      item->request.set_id(++last_id_);
      request = &item->request;
      if (item->request.has_forward() && mutation) {
        std::lock_guard<std::mutex> flight(item->flight->mutex);
        static_cast<ForwardFlight*>(item->flight)->id = last_id_;
      }
      under_way_.push_back(std::move(item));
    }
    // The item stays until its answer is read, which nobody can send before this has been written;
    // or until the stream has broken, which the end of reading finds out under send_mutex_.
    stream_->Write(*request);
    return absl::OkStatus();
  }

  // Counts one more mutation into the session's turn, which is waited for if there is none yet.
  absl::Status TakeTurn() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (mutations_ > 0) {
        ++mutations_;
        return absl::OkStatus();
      }
    }
    absl::StatusOr<uint64_t> next = session_->TakeTurn();
    if (!next.ok()) return next.status();
    std::lock_guard<std::mutex> lock(mutex_);
    mutations_ = 1;
    next_sequence_ = *next;
    applied_ = *next - 1;
    return absl::OkStatus();
  }

  // What is in a call's way. Needs mutex_.
  absl::Status Refusal(bool mutation) const {
    if (closed_) return Closed();
    if (!over_.ok()) return over_;
    if (!mutation || failed_.ok()) return absl::OkStatus();
    return absl::FailedPreconditionError(
        "a mutation of this pipeline before it failed; Wait for the pipeline first");
  }

  // One mutation's part in the turn. Needs mutex_.
  void GiveBack() {
    if (mutations_ == 0) return;  // the stream has ended meanwhile, and the turn with it
    if (--mutations_ == 0) session_->EndTurn(applied_ + 1);
  }

  void ReadAnswers() {
    pb::ExecuteResponse answer;
    absl::Status broken;
    while (broken.ok() && stream_->Read(&answer)) broken = Answered(answer);
    if (!broken.ok()) context_.TryCancel();
    const absl::Status end = ToAbsl(stream_->Finish(), context_, session_->connection().target());
    Ended(!broken.ok() ? broken : end);
  }

  absl::Status Answered(const pb::ExecuteResponse& answer) {
    std::unique_ptr<Item> item;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (under_way_.empty() || under_way_.front()->request.id() != answer.id())
        return absl::InternalError(
            absl::StrCat("the daemon answered call ", answer.id(), " out of turn"));
      item = std::move(under_way_.front());
      under_way_.pop_front();
      landing_ = true;
    }
    const absl::Status status = internal::WithRequestId(
        absl::Status(static_cast<absl::StatusCode>(answer.code()), answer.message()),
        answer.request_id());
    item->land(status, answer);
    std::lock_guard<std::mutex> lock(mutex_);
    if (item->mutation != nullptr) {
      if (status.ok()) {
        applied_ = item->mutation->sequence();
      } else if (failed_.ok()) {
        failed_ = status;
      }
      // After a failure the daemon refuses all that was sent behind: the failed one's number is
      // next.
      GiveBack();
    }
    landing_ = false;
    changed_.notify_all();
    return absl::OkStatus();
  }

  void Ended(const absl::Status& end) {
    std::deque<std::unique_ptr<Item>> lost;
    uint64_t next = 0;
    bool turn = false;
    {
      std::lock_guard<std::mutex> sending(send_mutex_);  // nobody writes an item any more
      std::lock_guard<std::mutex> lock(mutex_);
      over_ = !end.ok() ? end : absl::UnavailableError("the daemon ended the stream");
      if (closed_ && end.ok()) over_ = Closed();
      lost.swap(under_way_);
      if (!lost.empty() && failed_.ok()) failed_ = over_;
      landing_ = !lost.empty();
      next = applied_ + 1;
      turn = mutations_ > 0;
      mutations_ = 0;
    }
    std::vector<pb::ForwardRequest> forwards;
    size_t mutations = 0;
    for (const std::unique_ptr<Item>& item : lost) {
      if (item->mutation == nullptr) continue;
      ++mutations;
      if (item->request.has_forward()) forwards.push_back(item->request.forward());
    }
    const absl::Status over = lost.empty() ? end : over_;
    for (const std::unique_ptr<Item>& item : lost) item->land(over, {});
    if (turn) session_->EndTurn(next, mutations, std::move(forwards));
    std::lock_guard<std::mutex> lock(mutex_);
    landing_ = false;
    changed_.notify_all();
  }

  const std::shared_ptr<SessionCore> session_;
  const size_t depth_;
  grpc::ClientContext context_;
  std::unique_ptr<grpc::ClientReaderWriter<pb::ExecuteRequest, pb::ExecuteResponse>> stream_;

  std::mutex close_mutex_;
  std::mutex submit_mutex_;  // before the next two
  std::mutex send_mutex_;    // who writes to the stream; before mutex_
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::unique_ptr<Item>> under_way_;  // guarded by mutex_, as all below
  bool landing_ = false;                         // one that was under way is given its answer
  uint64_t last_id_ = 0;
  size_t mutations_ = 0;  // under way: the session's turn is the pipeline's while there are any
  uint64_t next_sequence_ = 0;  // of the next one
  uint64_t applied_ = 0;        // the last that ran
  absl::Status failed_;         // the first mutation's since the last Wait
  absl::Status over_;           // how the stream ended
  bool closed_ = false;
  std::thread reader_;  // last: it uses the rest
};

}  // namespace internal

using internal::Calls;
using internal::ForwardFlight;
using internal::Item;
using internal::Land;
namespace pb = lamina::v1;

namespace {

std::unique_ptr<Item> NewItem(std::chrono::milliseconds timeout) {
  auto item = std::make_unique<Item>();
  if (timeout.count() > 0)
    item->request.set_timeout_seconds(std::chrono::duration<double>(timeout).count());
  return item;
}

absl::Status CheckSession(const Stack& stack, const internal::SessionCore* session) {
  if (Calls::SessionOf(stack) == session) return absl::OkStatus();
  return absl::InvalidArgumentError("the stack is a handle of another session");
}

// What `make` gives, if all is well so far.
template <class Value, class Make>
absl::StatusOr<Value> If(const absl::Status& status, const Make& make) {
  if (!status.ok()) return status;
  return make();
}

}  // namespace

template <class Result>
bool Pending<Result>::Cancel() const {
  const std::shared_ptr<internal::PipelineCore> pipeline = pipeline_.lock();
  return pipeline != nullptr && !done() && pipeline->Cancel(flight_.get());
}
template class Pending<ForwardResult>;
template class Pending<BackwardResult>;
template class Pending<ApplyResult>;
template class Pending<Done>;

Pipeline::Pipeline(std::shared_ptr<internal::PipelineCore> core) : core_(std::move(core)) {}
Pipeline::Pipeline(Pipeline&&) noexcept = default;
Pipeline& Pipeline::operator=(Pipeline&& other) noexcept {
  if (this != &other) {
    Close();
    core_ = std::move(other.core_);
  }
  return *this;
}
Pipeline::~Pipeline() { Close(); }

void Pipeline::Close() {
  if (core_ != nullptr) core_->Close();
}
absl::Status Pipeline::Wait() { return core_->Wait(); }

Pending<ForwardResult> Pipeline::Forward(const Stack& stack, const Tensor& input,
                                         const ForwardOptions& options, Milliseconds timeout) {
  auto flight = std::make_shared<ForwardFlight>();
  Pending<ForwardResult> pending(flight, core_);
  absl::StatusOr<pb::ForwardRequest> request = If<pb::ForwardRequest>(
      CheckSession(stack, core_->session()), [&] { return Calls::Forward(stack, input, options); });
  if (!request.ok()) {
    Land<ForwardResult>(*flight, request.status());
    return pending;
  }
  std::unique_ptr<Item> item = NewItem(timeout);
  flight->keeps = request->training();
  *item->request.mutable_forward() = *std::move(request);
  if (flight->keeps) item->mutation = item->request.mutable_forward()->mutable_mutation();
  item->flight = flight.get();
  // `input` and what `options` names stay mapped until the call is done.
  item->land = [flight, stack, input, options](const absl::Status& status,
                                               const pb::ExecuteResponse& answer) {
    absl::StatusOr<ForwardResult> result =
        If<ForwardResult>(status, [&] { return Calls::Take(stack, answer.forward(), options); });
    std::lock_guard<std::mutex> lock(flight->mutex);
    if (result.ok() && flight->claimed) flight->context = std::move(result->context);
    flight->result = std::move(result);
    flight->done = true;
    flight->changed.notify_all();
  };
  core_->Submit(std::move(item));
  return pending;
}

Pending<BackwardResult> Pipeline::Backward(const Stack& stack,
                                           const Pending<ForwardResult>& forward,
                                           const Tensor& output_grad,
                                           const BackwardOptions& options, Milliseconds timeout) {
  auto flight = std::make_shared<internal::FlightOf<BackwardResult>>();
  Pending<BackwardResult> pending(flight, core_);
  const auto of = std::static_pointer_cast<ForwardFlight>(forward.flight_);
  absl::Status fits = CheckSession(stack, core_->session());
  if (fits.ok() && forward.pipeline_.lock() != core_)
    fits = absl::FailedPreconditionError("the forward is another pipeline's");
  absl::StatusOr<pb::BackwardRequest> request =
      If<pb::BackwardRequest>(fits, [&] { return Calls::Backward(stack, output_grad, options); });
  std::unique_ptr<Item> item = NewItem(timeout);
  if (request.ok()) {
    std::lock_guard<std::mutex> lock(of->mutex);
    if (!of->keeps || of->claimed || (of->done && of->result.ok() && !of->result->context)) {
      request = Calls::NoContext();
    } else if (of->done && !of->result.ok()) {
      request = absl::FailedPreconditionError(
          absl::StrCat("the forward failed: ", of->result.status().message()));
    } else {
      of->claimed = true;
      if (of->done) of->context = std::move(of->result->context);
      if (of->context) {
        request->set_context_id(of->context.id());
      } else {
        item->request.set_context_of(of->id);
      }
    }
  }
  if (!request.ok()) {
    Land<BackwardResult>(*flight, request.status());
    return pending;
  }
  *item->request.mutable_backward() = *std::move(request);
  item->mutation = item->request.mutable_backward()->mutable_mutation();
  item->flight = flight.get();
  item->land = [flight, of, output_grad, options](const absl::Status& status,
                                                  const pb::ExecuteResponse& answer) {
    Context context;
    {
      std::lock_guard<std::mutex> lock(of->mutex);
      context = std::move(of->context);
    }
    if (status.ok()) Calls::Spend(context);
    Land(*flight,
         If<BackwardResult>(status, [&] { return Calls::Take(answer.backward(), options); }));
    // Here a context that had no Backward goes.
  };
  core_->Submit(std::move(item));
  return pending;
}

Pending<BackwardResult> Pipeline::Backward(const Stack& stack, Context& context,
                                           const Tensor& output_grad,
                                           const BackwardOptions& options, Milliseconds timeout) {
  // As if a forward of this pipeline had given it.
  auto of = std::make_shared<ForwardFlight>();
  of->keeps = true;
  of->done = true;
  of->result = ForwardResult{};
  of->result->context = std::move(context);
  return Backward(stack, Pending<ForwardResult>(of, core_), output_grad, options, timeout);
}

Pending<ApplyResult> Pipeline::ApplyGradients(const Stack& stack, const OptimizerOptions& options,
                                              Milliseconds timeout) {
  auto flight = std::make_shared<internal::FlightOf<ApplyResult>>();
  Pending<ApplyResult> pending(flight, core_);
  if (absl::Status status = CheckSession(stack, core_->session()); !status.ok()) {
    Land<ApplyResult>(*flight, status);
    return pending;
  }
  std::unique_ptr<Item> item = NewItem(timeout);
  *item->request.mutable_apply_gradients() = Calls::Apply(stack, options);
  item->mutation = item->request.mutable_apply_gradients()->mutable_mutation();
  item->flight = flight.get();
  item->land = [flight](const absl::Status& status, const pb::ExecuteResponse& answer) {
    Land(*flight, If<ApplyResult>(status, [&] { return Calls::Take(answer.apply_gradients()); }));
  };
  core_->Submit(std::move(item));
  return pending;
}

Pending<Done> Pipeline::ZeroGradients(const Stack& stack, Milliseconds timeout) {
  auto flight = std::make_shared<internal::FlightOf<Done>>();
  Pending<Done> pending(flight, core_);
  if (absl::Status status = CheckSession(stack, core_->session()); !status.ok()) {
    Land<Done>(*flight, status);
    return pending;
  }
  std::unique_ptr<Item> item = NewItem(timeout);
  *item->request.mutable_zero_gradients() = Calls::Zero(stack);
  item->mutation = item->request.mutable_zero_gradients()->mutable_mutation();
  item->flight = flight.get();
  item->land = [flight](const absl::Status& status, const pb::ExecuteResponse&) {
    Land(*flight, If<Done>(status, [] { return Done{}; }));
  };
  core_->Submit(std::move(item));
  return pending;
}

absl::StatusOr<Pipeline> Session::OpenPipeline(const PipelineOptions& options) const {
  if (options.depth < 1 || options.depth > internal::kDeepest) {
    return absl::InvalidArgumentError(
        absl::StrCat("depth: ", options.depth, " is outside 1..", internal::kDeepest));
  }
  if (absl::Status over = core_->status(); !over.ok()) return over;
  return Pipeline(std::make_shared<internal::PipelineCore>(core_, options));
}

}  // namespace lamina::client
