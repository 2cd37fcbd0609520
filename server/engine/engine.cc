#include "server/engine/engine.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <filesystem>
#include <new>
#include <system_error>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "server/engine/call_checks.h"
#include "server/engine/device_peak.h"
#include "server/engine/engine_impl.h"
#include "server/engine/status_macros.h"

namespace lamina {

static_assert(kDeviceMemoryKinds == kMemoryKinds, "metrics.h lists the plan's kinds of memory");

namespace {

// What one core does in the tens of microseconds that two changes of threads take; it is not worth
// sharing out among cores either.
constexpr double kLightFlops = 1e6;
// Of one parameter's update, about; to copy or zero it is less.
constexpr double kOptimizerFlops = 16;

// Quotes what can be a name; the rest may be anything, and long.
absl::Status NoStack(const std::string& name) {
  return absl::NotFoundError(CheckName("stack", name).ok()
                                 ? absl::StrCat("stack: there is no stack \"", name, "\"")
                                 : "stack: there is no stack of this name");
}

}  // namespace

EngineImpl::EngineImpl(std::unique_ptr<Backend> backend, MetricSet* metrics, EngineOptions options)
    : backend_(std::move(backend)),
      metrics_(metrics),
      options_(std::move(options)),
      in_flight_(*backend_, *metrics_,
                 [this](const absl::Status& status) { return Ended(status); }),
      queue_(options_.queue_capacity, metrics) {
  metrics_->SetServing(true);
  metrics_->SetCheckpointsEnabled(!options_.checkpoint_dir.empty());
  metrics_->SetDeviceCapacity(device().total_bytes);
  for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF16})
    metrics_->SetPeakFlops(ComputeTypeOf(dtype), KnownPeakFlops(device().name, dtype),
                           /*measured=*/false);
}

EngineImpl::~EngineImpl() {
  Drain();
  // Where they were made; contexts before their stacks.
  (void)queue_.Run({}, Admission::kAlways, [this](Clock::time_point) {
    in_flight_.Settle();
    for (const auto& [name, entry] : stacks_) contexts_.StackDeleted(name);
    std::lock_guard<std::mutex> lock(mutex_);
    stacks_.clear();
    return absl::OkStatus();
  });
}

size_t EngineImpl::device_free_bytes() const { return backend_->FreeBytes().value_or(0); }

// --- the paths that calls share ---

absl::Status EngineImpl::CheckDevice() const {
  if (!failed_.load(std::memory_order_acquire)) return absl::OkStatus();
  metrics_->Rejected(Rejection::kDeviceFailed);
  return absl::UnavailableError(
      absl::StrCat("the device failed and the daemon must be restarted: ", health().message()));
}

absl::Status EngineImpl::CheckServing() const {
  if (draining_.load(std::memory_order_acquire)) {
    metrics_->Rejected(Rejection::kDraining);
    return absl::UnavailableError("the daemon is draining and takes no new calls");
  }
  return CheckDevice();
}

absl::Status EngineImpl::Run(const CallControl& control, Admission admission,
                             absl::FunctionRef<absl::Status(Clock::time_point)> work) {
  return RunBehind(control, admission, [&](Clock::time_point admitted) -> absl::Status {
    in_flight_.Settle();
    ENGINE_RETURN_IF_ERROR(CheckDevice());  // it may have failed just now
    return work(admitted);
  });
}

absl::Status EngineImpl::RunBehind(const CallControl& control, Admission admission,
                                   absl::FunctionRef<absl::Status(Clock::time_point)> work) {
  ENGINE_RETURN_IF_ERROR(CheckDevice());
  if (control.ready) ENGINE_RETURN_IF_ERROR(WaitUntilReady(control));
  return queue_.Run(control, admission, [&](Clock::time_point admitted) -> absl::Status {
    ENGINE_RETURN_IF_ERROR(CheckDevice());  // it may have failed while the call waited
    return work(admitted);
  });
}

// The host looks at the number itself, rather than have the stream wait for it: work that was
// enqueued can't be taken back, and would hold up everybody's behind it for as long as the number
// doesn't come.
absl::Status EngineImpl::WaitUntilReady(const CallControl& control) const {
  const Fence& ready = control.ready;
  const auto now = [&] {
    return std::atomic_ref<uint64_t>(*ready.at).load(std::memory_order_acquire);
  };
  if (now() >= ready.value) return absl::OkStatus();
  if (control.has_turn) return NotNow();
  const absl::Time begin = absl::Now();
  auto pause = std::chrono::microseconds(0);  // a client's stream is mostly about to come
  while (now() < ready.value) {
    if (control.cancelled && control.cancelled()) {
      metrics_->Rejected(Rejection::kCancelled);
      return absl::CancelledError(
          "cancelled while the call waited for `ready`; nothing has changed");
    }
    ENGINE_RETURN_IF_ERROR(CheckServing());
    const absl::Time time = absl::Now();
    if (time >= control.deadline) {
      metrics_->Rejected(Rejection::kDeadline);
      return absl::DeadlineExceededError(
          "the deadline passed while the call waited for `ready`; nothing has changed");
    }
    if (time - begin >= options_.ready_cap) {
      return absl::FailedPreconditionError(absl::StrCat(
          "ready.value: ", ready.value, " was not reached within ",
          absl::FormatDuration(options_.ready_cap), ", there is ", now(), "; nothing has changed"));
    }
    if (time - begin < absl::Microseconds(50)) {
      std::this_thread::yield();
    } else {
      // A part of what it has taken already. What is sent ahead waits for as long as a step takes.
      pause = std::clamp(std::chrono::microseconds((time - begin) / absl::Microseconds(32)),
                         std::chrono::microseconds(10), std::chrono::microseconds(1000));
      std::this_thread::sleep_for(pause);
    }
  }
  return absl::OkStatus();
}

absl::Status EngineImpl::OnDevice(absl::FunctionRef<absl::Status()> work) {
  absl::Status status;
  try {
    status = work();
  } catch (const std::bad_alloc&) {
    status = absl::InternalError("host memory ran out during a step");
  }
  if (status.ok()) return status;
  if (!absl::IsInternal(status)) {
    const absl::Status waited = backend_->Synchronize();
    if (waited.ok()) return status;
    status = waited;
  }
  Fail(status);
  (void)backend_->Synchronize();
  return status;
}

void EngineImpl::Fail(const absl::Status& why) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (health_.ok()) health_ = absl::UnavailableError(why.message());
  }
  failed_.store(true, std::memory_order_release);
  metrics_->SetServing(false);
}

// Once the device has failed nothing that was left is known to be whole, whatever its marks say.
absl::Status EngineImpl::Ended(const absl::Status& status) {
  if (!status.ok()) Fail(status);
  if (!failed_.load(std::memory_order_acquire)) return absl::OkStatus();
  return absl::InternalError(
      absl::StrCat("the device failed before the call had ended: ", health().message()));
}

absl::Status EngineImpl::health() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return health_;
}

absl::StatusOr<EngineImpl::Entry*> EngineImpl::Find(const std::string& name) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto it = stacks_.find(name);
  if (it == stacks_.end()) return NoStack(name);
  return it->second.get();
}

void EngineImpl::Publish(const std::string& name, Entry& entry, SessionKey session) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (session != 0) context_uses_[session] = contexts_.use(session);
    entry.info.context_bytes_in_use = entry.stack->context_bytes_in_use();
    entry.info.context_bytes_high_water = entry.stack->context_bytes_high_water();
    entry.info.counters = entry.stack->counters();
    entry.info.loss_scale = entry.stack->loss_scale();
    entry.info.outstanding_contexts = contexts_.live(name);
  }
  PublishContexts();
}

void EngineImpl::PublishContexts() {
  size_t in_use = 0, high_water = 0;
  for (const auto& [name, entry] : stacks_) {
    in_use += entry->stack->context_bytes_in_use();
    high_water += entry->stack->context_bytes_high_water();
  }
  metrics_->SetActivations(in_use, high_water);
  metrics_->SetContexts(contexts_.live());
}

void EngineImpl::PublishUses() {
  std::lock_guard<std::mutex> lock(mutex_);
  context_uses_ = contexts_.uses();
}

std::map<SessionKey, ContextUse> EngineImpl::ContextUses() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return context_uses_;
}

void EngineImpl::FindPeak(DType dtype) {
  const ComputeType type = ComputeTypeOf(dtype);
  if (!options_.measure_peak || metrics_->peak_flops(type) > 0) return;
  if (const double measured = MeasurePeakFlops(*backend_, dtype); measured > 0)
    metrics_->SetPeakFlops(type, measured, /*measured=*/true);
}

void EngineImpl::PublishPlans() {
  std::array<size_t, kDeviceMemoryKinds> bytes{};
  std::lock_guard<std::mutex> lock(mutex_);
  for (const auto& [name, entry] : stacks_)
    for (size_t kind = 0; kind < bytes.size(); ++kind)
      bytes[kind] += entry->info.plan.Bytes(static_cast<MemoryKind>(kind));
  metrics_->SetDeviceMemory(bytes);
  metrics_->SetStacks(static_cast<int64_t>(stacks_.size()));
}

bool EngineImpl::IsLight(const std::string& stack, Effort effort, double elements) const {
  if (!backend_->info().host_memory) return false;  // CUDA's calls belong to one thread
  if (effort == Effort::kNone) return true;
  std::lock_guard<std::mutex> lock(mutex_);
  const auto it = stacks_.find(stack);
  if (it == stacks_.end()) return true;  // refused at once
  const StackInfo& info = it->second->info;
  if (effort == Effort::kParameters)
    return kOptimizerFlops * static_cast<double>(info.parameter_count) <= kLightFlops;
  const double tokens = elements / static_cast<double>(info.config.hidden_size);
  // Before it is made an integer: a shape that nobody has checked yet may give any number.
  if (!(tokens >= 0 && tokens <= kLightFlops)) return false;
  const double longest = std::min(tokens, static_cast<double>(info.config.max_seq_length));
  const double flops = Stack::ForwardFlops(info.config, info.config.num_hidden_layers,
                                           static_cast<int64_t>(tokens), tokens * longest);
  return (effort == Effort::kBackward ? 2 : 1) * flops <= kLightFlops;
}

// --- stacks ---

absl::StatusOr<StackInfo> EngineImpl::AddStack(const std::string& name,
                                               const StackConfig& resolved) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (stacks_.count(name) > 0)
      return absl::AlreadyExistsError(
          absl::StrCat("name: there is a stack \"", name, "\" already"));
  }
  auto entry = std::make_unique<Entry>();
  const absl::Status created = OnDevice([&]() -> absl::Status {
    FindPeak(resolved.dtype);
    ENGINE_ASSIGN_OR_RETURN(entry->stack, Stack::Create(*backend_, resolved));
    return backend_->Synchronize();
  });
  if (absl::IsResourceExhausted(created)) metrics_->Rejected(Rejection::kStackMemory);
  ENGINE_RETURN_IF_ERROR(created);
  StackInfo& info = entry->info;
  info.name = name;
  info.config = entry->stack->config();
  info.plan = entry->stack->plan();
  info.parameters = entry->stack->parameters();
  for (const ParameterInfo& p : info.parameters) info.parameter_count += p.shape.elements();
  info.counters = entry->stack->counters();
  info.loss_scale = entry->stack->loss_scale();
  StackInfo result = info;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stacks_[name] = std::move(entry);
  }
  PublishPlans();
  return result;
}

absl::StatusOr<StackInfo> EngineImpl::CreateStack(const std::string& name,
                                                  const StackConfig& config,
                                                  const CallControl& control) {
  ENGINE_RETURN_IF_ERROR(CheckName("name", name));
  ENGINE_ASSIGN_OR_RETURN(const StackConfig resolved, Resolve(config, device().ordinal));
  StackInfo info;
  ENGINE_RETURN_IF_ERROR(Run(control, Admission::kCall, [&](Clock::time_point) -> absl::Status {
    ENGINE_ASSIGN_OR_RETURN(info, AddStack(name, resolved));
    return absl::OkStatus();
  }));
  return info;
}

absl::StatusOr<StackInfo> EngineImpl::GetStack(const std::string& name) {
  ENGINE_RETURN_IF_ERROR(CheckServing());
  std::lock_guard<std::mutex> lock(mutex_);
  const auto it = stacks_.find(name);
  if (it == stacks_.end()) return NoStack(name);
  return it->second->info;
}

std::vector<StackInfo> EngineImpl::ListStacks() {
  std::vector<StackInfo> infos;
  std::lock_guard<std::mutex> lock(mutex_);
  for (const auto& [name, entry] : stacks_) infos.push_back(entry->info);
  return infos;
}

absl::StatusOr<StackInfo> EngineImpl::UpdateStack(const std::string& name,
                                                  const StackChanges& changes,
                                                  const CallControl& control) {
  if (!changes.attn_dropout_ratio && !changes.hidden_dropout_ratio && !changes.training &&
      !changes.normalize_invertible && !changes.gelu_checkpoint &&
      !changes.attn_dropout_checkpoint && !changes.activation_checkpointing &&
      !changes.stochastic_mode)
    return absl::InvalidArgumentError("UpdateStackRequest: has nothing to change");
  StackInfo info;
  ENGINE_RETURN_IF_ERROR(Run(control, Admission::kCall, [&](Clock::time_point) -> absl::Status {
    ENGINE_ASSIGN_OR_RETURN(Entry* const entry, Find(name));
    Stack& stack = *entry->stack;
    ahead_ = {};  // its memory may be laid out anew
    const absl::Status changed = OnDevice([&]() -> absl::Status {
      ENGINE_RETURN_IF_ERROR(stack.Update(changes));
      return backend_->Synchronize();
    });
    if (absl::IsResourceExhausted(changed)) metrics_->Rejected(Rejection::kStackMemory);
    ENGINE_RETURN_IF_ERROR(changed);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      entry->info.config = stack.config();
      entry->info.plan = stack.plan();
    }
    PublishPlans();
    Publish(name, *entry);
    std::lock_guard<std::mutex> lock(mutex_);
    info = entry->info;
    return absl::OkStatus();
  }));
  return info;
}

void EngineImpl::RemoveStack(const std::string& name) {
  contexts_.StackDeleted(name);
  ahead_ = {};
  std::unique_ptr<Entry> entry;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto it = stacks_.find(name);
    entry = std::move(it->second);
    stacks_.erase(it);
  }
  entry.reset();  // frees device memory: not while others wait for the mutex
  PublishPlans();
  PublishUses();
  PublishContexts();
}

absl::Status EngineImpl::DeleteStack(const std::string& name, const CallControl& control) {
  return Run(control, Admission::kCall, [&](Clock::time_point) -> absl::Status {
    ENGINE_RETURN_IF_ERROR(Find(name).status());
    RemoveStack(name);
    return absl::OkStatus();
  });
}

absl::StatusOr<PlanOutcome> EngineImpl::PlanMemory(const StackConfig& config) {
  ENGINE_RETURN_IF_ERROR(CheckServing());
  PlanOutcome outcome;
  ENGINE_ASSIGN_OR_RETURN(outcome.config, Resolve(config, device().ordinal));
  ENGINE_ASSIGN_OR_RETURN(outcome.plan, PlanStack(outcome.config, backend_->sizes()));
  ENGINE_ASSIGN_OR_RETURN(outcome.free_bytes, backend_->FreeBytes());
  return outcome;
}

// --- the daemon's life ---

absl::Status EngineImpl::RegisterHost(void* data, size_t bytes) {
  ENGINE_RETURN_IF_ERROR(CheckDevice());
  return backend_->RegisterHost(data, bytes);
}

void EngineImpl::UnregisterHost(void* data) { backend_->UnregisterHost(data); }

absl::StatusOr<std::unique_ptr<SharedMemory>> EngineImpl::AllocateShared(size_t bytes,
                                                                         SharingKind kind) {
  ENGINE_RETURN_IF_ERROR(CheckDevice());
  ENGINE_ASSIGN_OR_RETURN(const size_t free_bytes, backend_->FreeBytes());
  if (bytes > free_bytes)
    return absl::ResourceExhaustedError(
        absl::StrCat(free_bytes, " bytes are free on the device, about"));
  return backend_->AllocateShared(bytes, kind);
}

void EngineImpl::EndSession(SessionKey session) {
  // Not through Run: contexts go on a failed device too. Only running out of memory can stop it,
  // and then the session's contexts stay until their stack goes.
  (void)queue_.Run({}, Admission::kAlways, [&](Clock::time_point) {
    in_flight_.Settle();
    contexts_.SessionEnded(session);
    PublishUses();
    for (const auto& [name, entry] : stacks_) Publish(name, *entry);
    return absl::OkStatus();
  });
}

void EngineImpl::Drain() {
  draining_.store(true, std::memory_order_release);
  metrics_->SetServing(false);
  queue_.Drain();
  (void)queue_.Run({}, Admission::kAlways, [this](Clock::time_point) {
    in_flight_.Settle();
    return absl::OkStatus();
  });
}

absl::StatusOr<std::unique_ptr<Engine>> Engine::Create(std::unique_ptr<Backend> backend,
                                                       MetricSet* metrics, EngineOptions options) {
  if (options.queue_capacity < 1)
    return absl::InvalidArgumentError(
        absl::StrCat("queue capacity: is ", options.queue_capacity, "; it must be 1 or more"));
  if (!options.checkpoint_dir.empty()) {
    std::error_code error;
    std::filesystem::create_directories(options.checkpoint_dir, error);
    if (error)
      return absl::FailedPreconditionError(absl::StrCat(
          "checkpoint folder ", options.checkpoint_dir, ": can't be made: ", error.message()));
    if (!std::filesystem::is_directory(options.checkpoint_dir, error))
      return absl::FailedPreconditionError(
          absl::StrCat("checkpoint folder ", options.checkpoint_dir, ": is no folder"));
    if (access(options.checkpoint_dir.c_str(), R_OK | W_OK | X_OK) != 0)
      return absl::FailedPreconditionError(absl::StrCat(
          "checkpoint folder ", options.checkpoint_dir, ": may not be read and written"));
  }
  return std::make_unique<EngineImpl>(std::move(backend), metrics, std::move(options));
}

}  // namespace lamina
