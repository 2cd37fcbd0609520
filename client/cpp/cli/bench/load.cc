#include "cli/bench/load.h"

#include <sys/prctl.h>

#include <algorithm>
#include <barrier>
#include <cmath>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "cli/bench/schedule.h"

namespace lamina::cli {
namespace {

using client::BackwardResult;
using client::ForwardResult;
using client::Pending;
using client::Tensor;
using Clock = Schedule::Clock;

double SecondsBetween(Clock::time_point from, Clock::time_point to) {
  return std::chrono::duration<double>(to - from).count();
}

bool MeansLoad(absl::StatusCode code) {
  return code == absl::StatusCode::kResourceExhausted ||
         code == absl::StatusCode::kDeadlineExceeded || code == absl::StatusCode::kAborted ||
         code == absl::StatusCode::kCancelled;
}

// What a client works with. Its input and output gradient stay as they are, so that steps may
// follow one another without a look at them.
struct LoadClient {
  client::Client connection;
  client::Session session;
  client::Stack stack;
  Tensor x, y, dy, dx;  // dy and dx: in training
};

absl::Status FillWithWaves(const Tensor& tensor) {
  std::vector<float> values(tensor.size());
  for (size_t i = 0; i < values.size(); ++i) {
    values[i] = static_cast<float>(std::sin(0.37 * static_cast<double>(i)));
  }
  return tensor.CopyFrom(values);
}

absl::StatusOr<LoadClient> MakeLoadClient(const ConnectFunction& connect,
                                          const LoadOptions& options) {
  absl::StatusOr<client::Client> connection = connect();
  if (!connection.ok()) return connection.status();
  absl::StatusOr<client::Session> session =
      connection->OpenSession({.client_name = "lamina bench", .transport = options.transport});
  if (!session.ok()) return session.status();
  absl::StatusOr<client::Stack> stack = session->OpenStack(options.stack);
  if (!stack.ok()) return stack.status();
  LoadClient made{*std::move(connection), *std::move(session), *std::move(stack), {}, {}, {}, {}};
  std::vector<Tensor*> tensors = {&made.x, &made.y};
  if (options.train) tensors.insert(tensors.end(), {&made.dy, &made.dx});
  for (Tensor* tensor : tensors) {
    absl::StatusOr<Tensor> memory =
        made.session.NewTensor(made.stack.config().dtype, options.shape);
    if (!memory.ok()) return memory.status();
    *tensor = *std::move(memory);
  }
  if (absl::Status status = FillWithWaves(made.x); !status.ok()) return status;
  if (options.train) {
    if (absl::Status status = FillWithWaves(made.dy); !status.ok()) return status;
  }
  return made;
}

struct Measured {
  Samples forward, backward, step;
};

// Steps of one client, one after another or several under way; `into` is null while it warms up.
class Stepper {
 public:
  virtual ~Stepper() = default;
  // Begins a step. An error that means more than load.
  virtual absl::Status Step(Clock::time_point intended, Measured* into) = 0;
  // Waits for the steps under way.
  virtual absl::Status Finish() { return absl::OkStatus(); }
};

class UnaryStepper : public Stepper {
 public:
  UnaryStepper(const LoadClient& client, const LoadOptions& options)
      : client_(client), train_(options.train) {}

  absl::Status Step(Clock::time_point intended, Measured* into) override {
    absl::StatusOr<ForwardResult> forward =
        client_.stack.Forward(client_.x, {.output = client_.y, .training = train_});
    const Clock::time_point between = Clock::now();
    if (!forward.ok()) return Failed(forward.status(), into ? &into->forward : nullptr);
    if (into != nullptr) into->forward.Add(SecondsBetween(intended, between), forward->timing);
    if (train_) {
      const absl::StatusOr<BackwardResult> backward =
          client_.stack.Backward(forward->context, client_.dy, {.input_grad = client_.dx});
      if (!backward.ok()) return Failed(backward.status(), into ? &into->backward : nullptr);
      if (into != nullptr)
        into->backward.Add(SecondsBetween(between, Clock::now()), backward->timing);
    }
    if (into != nullptr) into->step.Add(SecondsBetween(intended, Clock::now()));
    return absl::OkStatus();
  }

 private:
  static absl::Status Failed(const absl::Status& status, Samples* samples) {
    if (!MeansLoad(status.code())) return status;
    if (samples != nullptr) samples->AddError(status.code());
    return absl::OkStatus();
  }

  const LoadClient& client_;
  const bool train_;
};

// Sends steps on a pipeline; a thread of its own takes the answers, which come in order.
class PipelineStepper : public Stepper {
 public:
  PipelineStepper(const LoadClient& client, client::Pipeline pipeline, const LoadOptions& options)
      : client_(client),
        train_(options.train),
        open_loop_(options.rate > 0),
        timeout_(options.timeout),
        window_(static_cast<size_t>(std::max(1, options.depth / (options.train ? 2 : 1)))),
        pipeline_(std::move(pipeline)),
        taker_([this] { TakeAnswers(); }) {}

  ~PipelineStepper() override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      over_ = true;
    }
    changed_.notify_all();
    taker_.join();
  }

  absl::Status Step(Clock::time_point intended, Measured* into) override {
    bool failed = false;
    {
      std::unique_lock<std::mutex> lock(mutex_);
      // After a failure what was sent behind it fails too; the pipeline is to be emptied first.
      changed_.wait(lock, [this] {
        return !fatal_.ok() || under_way_.empty() || (!failed_ && under_way_.size() < window_);
      });
      if (!fatal_.ok()) return fatal_;
      failed = failed_;
    }
    if (failed) {
      // Its status was counted with its call.
      pipeline_.Wait().IgnoreError();
      std::lock_guard<std::mutex> lock(mutex_);
      failed_ = false;
    }
    UnderWay step;
    // In a closed loop a step begins when there is room for it.
    step.intended = open_loop_ ? intended : Clock::now();
    step.into = into;
    step.forward = pipeline_.Forward(client_.stack, client_.x,
                                     {.output = client_.y, .training = train_}, timeout_);
    step.backward_sent = Clock::now();
    if (train_) {
      step.backward = pipeline_.Backward(client_.stack, step.forward, client_.dy,
                                         {.input_grad = client_.dx}, timeout_);
    }
    std::lock_guard<std::mutex> lock(mutex_);
    under_way_.push_back(std::move(step));
    changed_.notify_all();
    return absl::OkStatus();
  }

  absl::Status Finish() override {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [this] { return under_way_.empty(); });
    return fatal_;
  }

 private:
  struct UnderWay {
    Clock::time_point intended, backward_sent;
    Measured* into = nullptr;
    Pending<ForwardResult> forward;
    std::optional<Pending<BackwardResult>> backward;
  };

  void TakeAnswers() {
    while (true) {
      UnderWay step;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        changed_.wait(lock, [this] { return over_ || !under_way_.empty(); });
        if (under_way_.empty()) return;
        step = under_way_.front();  // it counts as under way until its answers are here
      }
      bool whole = Take(step.forward, step.intended, step.into ? &step.into->forward : nullptr);
      if (step.backward.has_value()) {
        whole &=
            Take(*step.backward, step.backward_sent, step.into ? &step.into->backward : nullptr);
      }
      if (whole && step.into != nullptr)
        step.into->step.Add(SecondsBetween(step.intended, Clock::now()));
      std::lock_guard<std::mutex> lock(mutex_);
      under_way_.pop_front();
      changed_.notify_all();
    }
  }

  // Whether the call succeeded.
  template <class Result>
  bool Take(const Pending<Result>& call, Clock::time_point from, Samples* samples) {
    const absl::StatusOr<Result> result = call.Take();
    const Clock::time_point now = Clock::now();
    if (result.ok()) {
      if (samples != nullptr) samples->Add(SecondsBetween(from, now), result->timing);
      return true;
    }
    const absl::StatusCode code = result.status().code();
    std::lock_guard<std::mutex> lock(mutex_);
    const bool follows = failed_ && code == absl::StatusCode::kFailedPrecondition;
    if (!follows && !MeansLoad(code)) fatal_.Update(result.status());
    failed_ = true;
    if (samples != nullptr) samples->AddError(code);
    return false;
  }

  const LoadClient& client_;
  const bool train_, open_loop_;
  const std::chrono::milliseconds timeout_;
  const size_t window_;  // steps
  client::Pipeline pipeline_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<UnderWay> under_way_;  // guarded by mutex_, as all here
  bool failed_ = false;             // a call, since the pipeline was last empty
  bool over_ = false;
  absl::Status fatal_;
  std::thread taker_;
};

absl::StatusOr<std::unique_ptr<Stepper>> MakeStepper(const LoadClient& client,
                                                     const LoadOptions& options) {
  if (!options.pipeline) return std::make_unique<UnaryStepper>(client, options);
  absl::StatusOr<client::Pipeline> pipeline = client.session.OpenPipeline({.depth = options.depth});
  if (!pipeline.ok()) return pipeline.status();
  return std::make_unique<PipelineStepper>(client, *std::move(pipeline), options);
}

absl::Status WarmUp(Stepper& stepper, int64_t steps) {
  absl::Status status;
  for (int64_t i = 0; i < steps && status.ok(); ++i) status = stepper.Step(Clock::now(), nullptr);
  status.Update(stepper.Finish());
  return status;
}

absl::Status RunSteps(Stepper& stepper, Schedule& schedule, Measured* into) {
  absl::Status status;
  while (const std::optional<Clock::time_point> intended = schedule.Next()) {
    status = stepper.Step(*intended, into);
    if (!status.ok()) break;
  }
  status.Update(stepper.Finish());
  return status;
}

}  // namespace

absl::StatusOr<LoadResult> GenerateLoad(const ConnectFunction& connect,
                                        const LoadOptions& options) {
  std::deque<LoadClient> clients;
  std::vector<std::unique_ptr<Stepper>> steppers;
  for (int i = 0; i < options.concurrency; ++i) {
    absl::StatusOr<LoadClient> client = MakeLoadClient(connect, options);
    if (!client.ok()) return client.status();
    clients.push_back(*std::move(client));
    absl::StatusOr<std::unique_ptr<Stepper>> stepper = MakeStepper(clients.back(), options);
    if (!stepper.ok()) return stepper.status();
    steppers.push_back(*std::move(stepper));
  }

  Schedule schedule(options.rate, options.seed, options.seconds);
  std::vector<Measured> measured(clients.size());
  std::vector<absl::Status> ends(clients.size());
  Clock::time_point start;
  std::barrier warm(options.concurrency, [&]() noexcept {
    start = Clock::now();
    schedule.Start(start);
  });
  std::vector<std::thread> threads;
  for (size_t i = 0; i < clients.size(); ++i) {
    threads.emplace_back([&, i] {
      // An open loop's arrivals are not to be 50 µs late, which is what the system allows itself.
      prctl(PR_SET_TIMERSLACK, 1UL);
      ends[i] = WarmUp(*steppers[i], options.warmup);
      if (!ends[i].ok()) schedule.Stop();
      warm.arrive_and_wait();
      if (ends[i].ok()) ends[i] = RunSteps(*steppers[i], schedule, &measured[i]);
      if (!ends[i].ok()) schedule.Stop();
    });
  }
  for (std::thread& thread : threads) thread.join();
  const double seconds = SecondsBetween(start, Clock::now());
  for (const absl::Status& end : ends) {
    if (!end.ok()) return end;
  }

  LoadResult result;
  result.seconds = std::max(seconds, options.seconds);
  result.not_started = schedule.NotStarted();
  for (const Measured& part : measured) {
    result.forward.Merge(part.forward);
    result.backward.Merge(part.backward);
    result.step.Merge(part.step);
  }
  steppers.clear();  // pipelines end before their sessions
  if (options.train) {
    if (absl::Status status = clients.front().stack.ZeroGradients(); !status.ok()) return status;
  }
  return result;
}

}  // namespace lamina::cli
