// The engine's state and the paths that its calls share. engine.cc has stacks and the daemon's
// life, engine_steps.cc the steps, engine_parameters.cc parameters and checkpoints.
#pragma once

#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "server/engine/context_table.h"
#include "server/engine/device_queue.h"
#include "server/engine/engine.h"
#include "server/engine/steps_in_flight.h"
#include "server/metrics/metrics.h"

namespace lamina {

class EngineImpl final : public Engine {
 public:
  EngineImpl(std::unique_ptr<Backend> backend, MetricSet* metrics, EngineOptions options);
  ~EngineImpl() override;

  const DeviceInfo& device() const override { return backend_->info(); }
  size_t device_free_bytes() const override;
  const EngineOptions& options() const override { return options_; }

  absl::StatusOr<StackInfo> CreateStack(const std::string& name, const StackConfig& config,
                                        const CallControl& control) override;
  absl::StatusOr<StackInfo> GetStack(const std::string& name) override;
  std::vector<StackInfo> ListStacks() override;
  absl::StatusOr<StackInfo> UpdateStack(const std::string& name, const StackChanges& changes,
                                        const CallControl& control) override;
  absl::Status DeleteStack(const std::string& name, const CallControl& control) override;
  absl::StatusOr<PlanOutcome> PlanMemory(const StackConfig& config) override;
  std::map<SessionKey, ContextUse> ContextUses() const override;

  bool IsLight(const std::string& stack, Effort effort, double elements) const override;
  DeviceTurn TryTurn() override { return queue_.TryTurn(); }
  bool TryPost(std::function<void()> task) override { return queue_.TryPost(std::move(task)); }
  bool TurnIsWanted() const override { return queue_.TurnIsWanted(); }
  bool WorksBeside() const override { return !backend_->info().host_memory; }

  absl::StatusOr<ForwardOutcome> Forward(const ForwardCall& call,
                                         const CallControl& control) override;
  absl::StatusOr<BackwardOutcome> Backward(const BackwardCall& call,
                                           const CallControl& control) override;
  absl::StatusOr<ApplyOutcome> ApplyGradients(const std::string& stack,
                                              const OptimizerOptions& options, bool zero_gradients,
                                              const CallControl& control) override;
  absl::Status ZeroGradients(const std::string& stack, const CallControl& control) override;
  absl::Status ReleaseContext(const std::string& stack, SessionKey session,
                              const std::string& context_id, const CallControl& control) override;

  absl::StatusOr<std::vector<ParameterRead>> DescribeParameters(
      const std::string& stack, const std::vector<std::string>& names, DType dtype,
      bool gradients) override;
  absl::Status ReadParameters(const std::string& stack, const std::vector<std::string>& names,
                              DType dtype, bool gradients, const ParameterTarget& target,
                              const CallControl& control) override;
  absl::Status WriteParameters(const std::string& stack, const std::vector<ParameterValue>& values,
                               const CallControl& control) override;

  absl::StatusOr<CheckpointInfo> SaveCheckpoint(const std::string& stack, const std::string& name,
                                                const CallControl& control) override;
  absl::StatusOr<StackInfo> LoadCheckpoint(const std::string& stack, const std::string& name,
                                           bool create, const CallControl& control) override;

  absl::Status RegisterHost(void* data, size_t bytes) override;
  void UnregisterHost(void* data) override;
  absl::StatusOr<std::unique_ptr<SharedMemory>> AllocateShared(size_t bytes,
                                                               SharingKind kind) override;
  void EndSession(SessionKey session) override;
  void Drain() override;
  absl::Status health() const override;

 private:
  using Clock = DeviceQueue::Clock;
  using Admission = DeviceQueue::Admission;

  struct Entry {
    std::unique_ptr<Stack> stack;  // whoever's turn it is
    StackInfo info;                // guarded by mutex_: what GetStack shows
  };

  // Runs `work` in its turn unless the device has failed, once the device is still.
  absl::Status Run(const CallControl& control, Admission admission,
                   absl::FunctionRef<absl::Status(Clock::time_point admitted)> work);
  // The same for work that is enqueued behind what still runs, and changes nothing else that this
  // uses.
  absl::Status RunBehind(const CallControl& control, Admission admission,
                         absl::FunctionRef<absl::Status(Clock::time_point admitted)> work);
  // Waits until control.ready is reached: see Run's statuses, and FAILED_PRECONDITION: the cap on
  // such waits. NotNow: it would have to wait, and the caller has the turn.
  absl::Status WaitUntilReady(const CallControl& control) const;
  // UNAVAILABLE where the device has failed.
  absl::Status CheckDevice() const;
  absl::Status CheckServing() const;

  // --- the rest in its turn on the device ---

  // Work on the device. An INTERNAL status, or memory that runs out on the way, leaves the device's
  // state unknown: the engine then refuses everything. Waits for what was enqueued where `work`
  // fails: the caller's memory may go once this returns.
  absl::Status OnDevice(absl::FunctionRef<absl::Status()> work);
  void Fail(const absl::Status& why);
  // What to say of a step that was left, after what came of it. Any thread.
  absl::Status Ended(const absl::Status& status);

  absl::StatusOr<Entry*> Find(const std::string& name);
  absl::StatusOr<StackInfo> AddStack(const std::string& name, const StackConfig& resolved);
  // After a change: what GetStack shows, and the gauges. `session`: whose contexts changed.
  void Publish(const std::string& name, Entry& entry, SessionKey session = 0);
  void PublishUses();  // of all sessions' contexts
  // Sees to it that the peak for this dtype is known, if it can be.
  void FindPeak(DType dtype);
  void PublishPlans();
  void PublishContexts();
  void RemoveStack(const std::string& name);  // which exists
  absl::StatusOr<CheckpointInfo> Save(const std::string& stack, const std::string& name,
                                      const CallControl& control);
  absl::StatusOr<StackInfo> Load(const std::string& stack, const std::string& name, bool create,
                                 const CallControl& control);
  void CountFailure(CheckpointOp op, const absl::Status& status);

  absl::Status RunForward(const ForwardCall& call, const CallControl& control,
                          Clock::time_point admitted, ForwardOutcome& outcome);
  absl::Status RunBackward(const BackwardCall& call, const CallControl& control,
                           Clock::time_point admitted, BackwardOutcome& outcome);
  // `tensor` for kernels to read: where it is, or copied into a slot of the stack's staging.
  absl::StatusOr<TensorView> InputView(Stack& stack, Stack::Staging slot, const CallTensor& tensor,
                                       const Shape& shape);
  // The same of a call's main input, which may have been copied ahead.
  absl::StatusOr<TensorView> MainInputView(Stack& stack, const CallTensor& tensor,
                                           const Shape& shape, uint64_t ticket);
  // Begins to copy the next call's input, unless `output`, where this one's result goes, is there,
  // or a step that still runs writes there. Whether it did; `mark` remembers the end.
  absl::StatusOr<bool> CopyAhead(const NextInput& next, const CallTensor& output, int mark);
  // Where kernels write what is to come to `target`: there, or in the stack's staging.
  absl::StatusOr<TensorView> OutputView(Stack& stack, const CallTensor& target);
  // Brings it there, if it is not, and records `mark` behind it. `beside`: while what is enqueued
  // next runs, if that is worth it.
  absl::Status Deliver(Stack& stack, const TensorView& view, const CallTensor& target,
                       const Fence& done, bool beside, int mark);
  // Marks for a step that begins (StepsInFlight::TakeMarks). UNAVAILABLE as CheckDevice.
  absl::StatusOr<int> NewMarks();
  // Whether a step that has been enqueued is to be left, rather than waited for here.
  bool IsLeft(int marks) const;
  // Of one that is not: waits for it, and reads its times.
  absl::Status FinishStep(int marks, Clock::time_point admitted, StepTimes& times);
  void CountTensor(const CallTensor& tensor, TensorRole role);
  void CountInline(size_t bytes);

  std::unique_ptr<Backend> backend_;
  MetricSet* const metrics_;
  const EngineOptions options_;

  mutable std::mutex mutex_;
  // Changed by who has the turn alone; guarded by mutex_ for the others' sake.
  std::map<std::string, std::unique_ptr<Entry>> stacks_;
  std::map<SessionKey, ContextUse> context_uses_;  // guarded by mutex_
  absl::Status health_;                            // guarded by mutex_
  std::atomic<bool> failed_{false};                // health_ is not OK
  std::atomic<bool> draining_{false};              // Drain was called

  // What lies in a stack's staging for the next call's input. Whoever's turn it is, as the next
  // two.
  struct Ahead {
    uint64_t ticket = 0;  // 0: nothing
    const Stack* stack = nullptr;
    size_t bytes = 0;
  } ahead_;
  ContextTable contexts_;
  // The running call's lengths or cumulative lengths, checked.
  std::vector<int32_t> lengths_;

  StepsInFlight in_flight_;  // whoever's turn it is

  std::timed_mutex
      checkpoint_mutex_;  // one save at a time: they appear in the order of their steps
  DeviceQueue queue_;     // last: its thread uses the rest
};

}  // namespace lamina
