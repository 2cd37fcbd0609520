// The engine: stacks, their contexts, and the one device thread that runs every call on them.
//
// Calls come from any thread and block until the device thread has finished them (or refused them).
// Who finds the device idle may spare itself that: by taking the device's turn, or by leaving the
// whole of its work to the device thread.
// The queue between is bounded: a full one answers RESOURCE_EXHAUSTED at once. A call whose
// deadline passes or that is cancelled while it waits in the queue is dropped with nothing changed;
// once the device thread has begun it, it runs to its end. On a device that works beside its thread
// a step may be enqueued while the one before it runs (CallControl::left), by whoever's turn it is:
// others that wait for the turn go first.
//
// All checks of a call against its stack (dtype, shape, ranges) happen before anything is changed;
// the messages name the field as the proto does. Ids of sessions and regions never reach this
// layer: a session is a SessionKey here, a region's slice is a CallTensor.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "lamina/kernels/backend.h"
#include "lamina/transformer/config.h"
#include "lamina/transformer/plan.h"
#include "lamina/transformer/stack.h"

namespace lamina {

class MetricSet;    // server/metrics/metrics.h
class MutationLog;  // server/engine/mutation_log.h

// A session as the engine knows it: a number that is never used twice and is no secret.
using SessionKey = uint64_t;

// How a tensor crosses the boundary; the values are the proto's.
enum class TensorTransport : uint8_t { kNone = 0, kInline = 1, kMemfd = 2, kDevice = 3 };

// A dense tensor that a call reads or writes, in the host's or the device's memory. `keep` holds
// the memory (a region's mapping, a message's bytes) for as long as the call needs it.
struct CallTensor {
  void* data = nullptr;
  DType dtype = DType::kF32;
  Shape shape;
  TensorTransport transport = TensorTransport::kNone;
  Memory memory = Memory::kHost;
  std::shared_ptr<const void> keep;

  explicit operator bool() const { return data != nullptr; }
  size_t bytes() const { return static_cast<size_t>(shape.elements()) * SizeOf(dtype); }
};

// A number in host memory that a client's process sees too, aligned to 8: it is reached once what
// is there is `value` or more. `keep` holds the memory.
struct Fence {
  uint64_t* at = nullptr;  // null: none
  uint64_t value = 0;
  std::shared_ptr<const void> keep;

  explicit operator bool() const { return at != nullptr; }
};

// The input of a call that its client has sent behind the one that runs, in host memory.
struct NextInput {
  uint64_t ticket = 0;  // 0: none. The same as that call's own, and no other's
  std::string stack;
  CallTensor input;
};

struct StepTimes {
  double queue_seconds = 0, input_seconds = 0, compute_seconds = 0, output_seconds = 0;
};

// A step that the device still runs although its call has returned. Threads: any.
class RunningStep {
 public:
  virtual ~RunningStep() = default;  // waits for it
  // Waits: its results are there then. Where its time went. INTERNAL: the device failed.
  virtual absl::StatusOr<StepTimes> Wait() = 0;
};

// What a call has left to be done. Its answer is its client's once `step` is over, with the times
// that this says, and so is the place of its sequence in the log.
struct Left {
  std::shared_ptr<RunningStep> step;  // null: nothing; the call has ended
  std::shared_ptr<MutationLog> log;   // null: the call was no mutation
  uint64_t sequence = 0;
};

// What a call waits for, and how long it may wait for the device thread.
struct CallControl {
  absl::Time deadline = absl::InfiniteFuture();
  std::function<bool()> cancelled;  // empty: never; asked in its turn, before the call begins
  // The calling thread has the device's turn (Engine::TryTurn, TryPost) and waits for nothing: a
  // call that must wait for another one of its session answers NotNow.
  bool has_turn = false;
  // The call begins once this is reached. That is waited for by its own thread, before it is queued
  // for the device: a number that never comes holds nobody else up.
  Fence ready;
  // Where the device copies inputs: the next one is copied while this call computes, and is used if
  // the call that comes with this ticket is the next to look for it.
  NextInput next;
  uint64_t ticket = 0;  // this call's, if it was the next of another
  // If it is not null, a Forward or Backward may return once all of it has been enqueued, with its
  // outcome but for the times, and leave here what is to be waited for. Only a device that fails
  // can spoil it then. One that waits for the next to be enqueued behind it is what this is for.
  Left* left = nullptr;
  std::string caller;  // who makes the call, as Caller::identity; the engine does not care
  // What the call is called, for the log of steps and for the daemon's own. They outlive the call.
  absl::string_view request_id;  // empty: none
  uint64_t request_item = 0;     // the message's id in an Execute stream; 0: a call of its own
  absl::string_view trace_id;    // 32 hexadecimal digits; empty: none
  absl::string_view span_id;     // 16; the client's span
};

// Of a call that was not begun because it would have had to wait. No other call answers ABORTED.
inline absl::Status NotNow() { return absl::AbortedError("the call would have to wait"); }
inline bool IsNotNow(const absl::Status& status) { return absl::IsAborted(status); }

// The device's turn, given back when this goes. Empty: it was not to be had.
class [[nodiscard]] DeviceTurn {
 public:
  DeviceTurn() = default;
  explicit DeviceTurn(std::function<void()> give_back) : give_back_(std::move(give_back)) {}
  DeviceTurn(DeviceTurn&& other) noexcept : give_back_(std::exchange(other.give_back_, nullptr)) {}
  DeviceTurn& operator=(DeviceTurn&&) = delete;
  ~DeviceTurn() {
    if (give_back_) give_back_();
  }
  explicit operator bool() const { return static_cast<bool>(give_back_); }

 private:
  std::function<void()> give_back_;
};

// What a call makes the device do, as far as its duration goes.
enum class Effort : uint8_t {
  kForward,     // through all layers, at most
  kBackward,    // through all layers, at most
  kParameters,  // a pass over all parameters
  kNone,        // it only gives something back
};

struct ForwardCall {
  std::string stack;
  SessionKey session = 0;
  std::optional<LayerRange> layers;  // absent: all
  std::optional<bool> training;      // absent: as the stack's config says
  CallTensor input;                  // act [B, S, H]; [T, H] with cumulative_lengths
  // At most one of these three. The two of int32 are copied once, then the copy is checked.
  CallTensor mask;                // fp32 [B, 1, 1, S] or [B, S]; absent: none
  CallTensor lengths;             // int32 [B]; absent: none
  CallTensor cumulative_lengths;  // int32 [n + 1], of a packed batch; absent: not packed
  CallTensor output;  // shaped like input; data is null: the engine provides `inline_output`
  Fence done;         // stored by the device once the output is there, if all went well
};

struct ForwardOutcome {
  std::string context_id;     // empty in evaluation
  std::string inline_output;  // the output's bytes where ForwardCall::output had no data
  Shape output_shape;
  DType output_dtype = DType::kF32;
  bool fused_attention = false;  // which attention kernel ran: the fused one or the plain one
  StepTimes times;
};

struct BackwardCall {
  std::string stack;
  SessionKey session = 0;
  std::string context_id;
  CallTensor output_grad;  // act, shaped like the Forward's input
  CallTensor input_grad;   // the same; data null and want_input_grad: inline
  bool want_input_grad = false;
  Fence done;  // as a Forward's
};

struct BackwardOutcome {
  std::string inline_input_grad;
  Shape shape;
  DType dtype = DType::kF32;
  StepTimes times;
};

struct ApplyOutcome {
  ApplyResult result;
  StepTimes times;
};

// A stack as GetStack shows it.
struct StackInfo {
  std::string name;
  StackConfig config;
  MemoryPlan plan;
  int64_t parameter_count = 0;
  StackCounters counters;
  double loss_scale = 1.0;  // what to multiply the next loss by
  int64_t outstanding_contexts = 0;
  size_t context_bytes_in_use = 0;      // of the context arena
  size_t context_bytes_high_water = 0;  // the most that ever was
  std::vector<ParameterInfo> parameters;
};

// What a session's activation contexts take.
struct ContextUse {
  int64_t contexts = 0;
  size_t bytes = 0;
};

// Values to write to one parameter: fp32 or the stack's dtype.
struct ParameterValue {
  std::string name;
  CallTensor tensor;
};

struct ParameterRead {
  ParameterInfo info;
  DType dtype = DType::kF32;
};

// Where values that are read go.
struct ParameterTarget {
  void* data = nullptr;
  size_t bytes = 0;  // exactly those of what is read
  Memory memory = Memory::kHost;
};

struct CheckpointInfo {
  std::string path;
  uint64_t bytes = 0;
  int64_t step = 0;
};

struct PlanOutcome {
  StackConfig config;  // resolved
  MemoryPlan plan;
  size_t free_bytes = 0;
};

struct EngineOptions {
  std::string checkpoint_dir;  // empty: checkpoints answer FAILED_PRECONDITION
  int queue_capacity = 256;    // calls that wait
  size_t inline_cap_bytes = size_t{16} << 20;
  absl::Duration ready_cap = absl::Seconds(60);  // longest wait for CallControl::ready
  // Where the device's peak is not known by its name: a product is timed before the first stack of
  // each dtype is made. It takes some 10 ms.
  bool measure_peak = false;
};

class Engine {
 public:
  // `backend` is owned; `metrics` outlives the engine. Starts the device thread.
  static absl::StatusOr<std::unique_ptr<Engine>> Create(std::unique_ptr<Backend> backend,
                                                        MetricSet* metrics, EngineOptions options);
  virtual ~Engine() = default;  // drains, then joins the device thread

  virtual const DeviceInfo& device() const = 0;
  virtual size_t device_free_bytes() const = 0;
  virtual const EngineOptions& options() const = 0;

  // --- stacks; names are 1..64 of letters, digits, '.', '_', '-', not beginning with '.' ---
  virtual absl::StatusOr<StackInfo> CreateStack(const std::string& name, const StackConfig& config,
                                                const CallControl& control) = 0;
  virtual absl::StatusOr<StackInfo> GetStack(const std::string& name) = 0;
  virtual std::vector<StackInfo> ListStacks() = 0;
  virtual absl::StatusOr<StackInfo> UpdateStack(const std::string& name,
                                                const StackChanges& changes,
                                                const CallControl& control) = 0;
  virtual absl::Status DeleteStack(const std::string& name, const CallControl& control) = 0;
  virtual absl::StatusOr<PlanOutcome> PlanMemory(const StackConfig& config) = 0;

  // Of the sessions that have contexts. Waits for no step.
  virtual std::map<SessionKey, ContextUse> ContextUses() const = 0;

  // --- the device's turn ---
  // Whether a call of this effort takes a caller's thread no longer than two changes of threads
  // would. `elements`: of its input. Never on a device whose calls belong to one thread.
  virtual bool IsLight(const std::string& stack, Effort effort, double elements) const = 0;
  // The turn, if nothing runs or waits. Its holder sets CallControl::has_turn.
  virtual DeviceTurn TryTurn() = 0;
  // Has the device thread run `task` in its turn, if nothing runs or waits; the task's calls set
  // CallControl::has_turn. It throws nothing and waits for no other call.
  virtual bool TryPost(std::function<void()> task) = 0;
  // Whether other calls wait for whoever has the turn.
  virtual bool TurnIsWanted() const = 0;
  // Whether CallControl's `next` and `left` are any use: the device works beside its thread.
  virtual bool WorksBeside() const = 0;

  // --- steps ---
  virtual absl::StatusOr<ForwardOutcome> Forward(const ForwardCall& call,
                                                 const CallControl& control) = 0;
  virtual absl::StatusOr<BackwardOutcome> Backward(const BackwardCall& call,
                                                   const CallControl& control) = 0;
  virtual absl::StatusOr<ApplyOutcome> ApplyGradients(const std::string& stack,
                                                      const OptimizerOptions& options,
                                                      bool zero_gradients,
                                                      const CallControl& control) = 0;
  virtual absl::Status ZeroGradients(const std::string& stack, const CallControl& control) = 0;
  // Whatever `control` says of deadlines: what is given back is never given up.
  virtual absl::Status ReleaseContext(const std::string& stack, SessionKey session,
                                      const std::string& context_id,
                                      const CallControl& control) = 0;

  // --- parameters; `names` empty: all stored ones ---
  // What a read of these would give, to size a target with. NOT_FOUND names the missing one.
  virtual absl::StatusOr<std::vector<ParameterRead>> DescribeParameters(
      const std::string& stack, const std::vector<std::string>& names, DType dtype,
      bool gradients) = 0;
  // Writes the parts one after another to the target.
  virtual absl::Status ReadParameters(const std::string& stack,
                                      const std::vector<std::string>& names, DType dtype,
                                      bool gradients, const ParameterTarget& target,
                                      const CallControl& control) = 0;
  // The same into host memory.
  absl::Status ReadParameters(const std::string& stack, const std::vector<std::string>& names,
                              DType dtype, bool gradients, void* dst, size_t bytes,
                              const CallControl& control) {
    return ReadParameters(stack, names, dtype, gradients, {.data = dst, .bytes = bytes}, control);
  }
  // All or none; every value is checked before the first is written.
  virtual absl::Status WriteParameters(const std::string& stack,
                                       const std::vector<ParameterValue>& values,
                                       const CallControl& control) = 0;

  // --- checkpoints; an empty name means the stack's ---
  virtual absl::StatusOr<CheckpointInfo> SaveCheckpoint(const std::string& stack,
                                                        const std::string& name,
                                                        const CallControl& control) = 0;
  virtual absl::StatusOr<StackInfo> LoadCheckpoint(const std::string& stack,
                                                   const std::string& name, bool create,
                                                   const CallControl& control) = 0;

  // --- host memory that the device will move by DMA; any thread ---
  virtual absl::Status RegisterHost(void* data, size_t bytes) = 0;
  virtual void UnregisterHost(void* data) = 0;
  // --- device memory that other processes map; any thread. Must go before the engine ---
  virtual absl::StatusOr<std::unique_ptr<SharedMemory>> AllocateShared(size_t bytes,
                                                                       SharingKind kind) = 0;

  // Frees a session's contexts once the calls it already queued, and what they left, are done.
  // Returns when that is so.
  virtual void EndSession(SessionKey session) = 0;

  // Refuses new calls with UNAVAILABLE; returns when the queue is empty and the device is still.
  // Idempotent.
  virtual void Drain() = 0;
  // OK, or the device failure that made the engine refuse everything.
  virtual absl::Status health() const = 0;
};

}  // namespace lamina
