// Calls of one session that are under way together, on a stream (LayerService.Execute): the next
// ones are sent before the last ones are answered. The daemon runs them in the order in which they
// were made here.
//
//   Pipeline pipeline = session.OpenPipeline().value();
//   for (const Batch& batch : batches) {
//     Pending<ForwardResult> forward = pipeline.Forward(stack, batch.x, {.output = batch.y});
//     pipeline.Backward(stack, forward, batch.dy);
//   }
//   Pending<ApplyResult> applied = pipeline.ApplyGradients(stack, {.learning_rate = 1e-3});
//   absl::StatusOr<ApplyResult> result = applied.Take();
//
// Mutations (training forwards, backwards, ApplyGradients, ZeroGradients) depend on each other:
// after one that failed, was cancelled or came too late, all later ones of the pipeline fail with
// FAILED_PRECONDITION and change nothing, until Wait was called. Evaluations go on. While mutations
// are under way, those of others in the session (Stack's methods, another pipeline) wait.
//
// Tensors in regions are read and written when the call runs: they are the daemon's until it is
// done. Others are copied into the call at once.
//
// Where the stream itself breaks, what is under way ends with the stream's status and may have run,
// once; what is asked for later fails in the same way: open another pipeline. The session goes on.
#pragma once

#include <chrono>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "lamina/client/stack.h"
#include "lamina/client/tensor.h"

namespace lamina::client {

namespace internal {
class PipelineCore;
class SessionCore;

// One call, from when it is asked for until it is answered.
struct Flight {
  virtual ~Flight() = default;
  std::mutex mutex;
  std::condition_variable changed;
  bool done = false;  // guarded by mutex
};

template <class Result>
struct FlightOf : Flight {
  absl::StatusOr<Result> result = absl::UnknownError("under way");  // guarded by mutex
};
}  // namespace internal

struct PipelineOptions {
  // Calls under way at most, 1..63; the next one waits until one is answered.
  int depth = 32;
  std::chrono::milliseconds timeout{0};  // of the whole pipeline; 0: none
};

// What ZeroGradients gives.
struct Done {};

// What a call will give. A handle: copies mean the same call. Threads: any.
template <class Result>
class Pending {
 public:
  Pending() = default;  // of no call
  bool done() const {
    std::lock_guard<std::mutex> lock(flight_->mutex);
    return flight_->done;
  }
  // How the call ended, when it has.
  absl::Status Wait() const {
    std::unique_lock<std::mutex> lock(flight_->mutex);
    flight_->changed.wait(lock, [this] { return flight_->done; });
    return flight_->result.status();
  }
  // Its result, when it is there, to the first who asks; FAILED_PRECONDITION to others.
  absl::StatusOr<Result> Take() const {
    std::unique_lock<std::mutex> lock(flight_->mutex);
    flight_->changed.wait(lock, [this] { return flight_->done; });
    return std::exchange(flight_->result,
                         absl::FailedPreconditionError("the result was taken already"));
  }
  // Asks that the call not be run if it waits still: it ends with CANCELLED then. False: it is
  // done.
  bool Cancel() const;

 private:
  friend class Pipeline;
  Pending(std::shared_ptr<internal::FlightOf<Result>> flight,
          std::weak_ptr<internal::PipelineCore> pipeline)
      : flight_(std::move(flight)), pipeline_(std::move(pipeline)) {}
  std::shared_ptr<internal::FlightOf<Result>> flight_;
  std::weak_ptr<internal::PipelineCore> pipeline_;
};

// Threads: all methods from any thread. A method waits where `depth` calls are under way, and for
// others' mutations; for its own call's answer it does not.
class Pipeline {
 public:
  Pipeline(Pipeline&&) noexcept;
  Pipeline& operator=(Pipeline&&) noexcept;  // closes the one that was there
  ~Pipeline();                               // Close

  // `timeout`, of all calls here: within how long from its arrival the device must begin the call,
  // else it ends with DEADLINE_EXCEEDED and has not run; 0: none. Otherwise the arguments and
  // results are those of Stack's methods. What is wrong with them ends the call at once, without
  // the daemon.
  using Milliseconds = std::chrono::milliseconds;

  // Without ForwardOptions::output the output comes inside the answer. The result's context is
  // empty where a Backward on this pipeline was asked for before the result was taken.
  Pending<ForwardResult> Forward(const Stack& stack, const Tensor& input,
                                 const ForwardOptions& options = {}, Milliseconds timeout = {});
  // `forward`: a training forward of this pipeline, which need not have run and whose result was
  // not taken. FAILED_PRECONDITION: it is none, or had its Backward.
  Pending<BackwardResult> Backward(const Stack& stack, const Pending<ForwardResult>& forward,
                                   const Tensor& output_grad, const BackwardOptions& options = {},
                                   Milliseconds timeout = {});
  // Spends a context that is at hand.
  Pending<BackwardResult> Backward(const Stack& stack, Context& context, const Tensor& output_grad,
                                   const BackwardOptions& options = {}, Milliseconds timeout = {});
  Pending<ApplyResult> ApplyGradients(const Stack& stack, const OptimizerOptions& options,
                                      Milliseconds timeout = {});
  Pending<Done> ZeroGradients(const Stack& stack, Milliseconds timeout = {});

  // Waits until nothing is under way. The status of the first mutation that failed since the last
  // Wait, or how the stream ended. Mutations are taken again afterwards, unless it has.
  absl::Status Wait();
  // Takes no more calls and waits for those under way. Idempotent.
  void Close();

 private:
  friend class Session;
  explicit Pipeline(std::shared_ptr<internal::PipelineCore> core);
  std::shared_ptr<internal::PipelineCore> core_;
};

}  // namespace lamina::client
