#include "server/metrics/metrics.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "absl/strings/str_cat.h"
#include "prometheus/text_serializer.h"
#include "server/metrics/process_metrics.h"

namespace lamina {
namespace {

using prometheus::Counter;
using prometheus::Family;
using prometheus::Gauge;
using prometheus::Histogram;
using prometheus::Registry;

constexpr const char* kComputeTypeNames[kComputeTypes] = {"fp32", "bf16", "fp16"};
constexpr const char* kPhaseNames[kStepPhases] = {"queue", "input", "compute", "output", "total"};
constexpr const char* kMemoryKindNames[kDeviceMemoryKinds] = {
    "weights",     "master_weights", "gradients", "optimizer",
    "activations", "workspace",      "staging",   "graphs"};
constexpr const char* kCarrierNames[kTensorCarriers] = {"inline", "memfd", "device"};
constexpr const char* kRoleNames[] = {"input", "output"};
constexpr const char* kRejectionNames[kRejections] = {
    "queue_full",    "deadline",     "cancelled",     "draining",
    "device_failed", "stack_memory", "context_memory"};
constexpr const char* kCheckpointOpNames[] = {"save", "load"};
// What a session manager can say; the last stands for anything else.
constexpr const char* kSessionEndNames[] = {
    "deleted",           "keep_alive_closed", "keep_alive_broken",
    "keep_alive_silent", "lease_expired",     "grace_over",
    "protocol_error",    "shutdown",          "other"};
constexpr const char* kResumptionNames[kResumptions] = {"break", "takeover"};
constexpr const char* kCodeNames[] = {
    "OK",        "CANCELLED",      "UNKNOWN",           "INVALID_ARGUMENT",   "DEADLINE_EXCEEDED",
    "NOT_FOUND", "ALREADY_EXISTS", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION",
    "ABORTED",   "OUT_OF_RANGE",   "UNIMPLEMENTED",     "INTERNAL",           "UNAVAILABLE",
    "DATA_LOSS", "UNAUTHENTICATED"};
constexpr int kCodeUnknown = 2;

// From 100 us to 60 s, each about 1.6 times the one before: a rate of change of 10 % in a step's
// time moves a visible share of the steps into another bucket.
const Histogram::BucketBoundaries& StepBuckets() {
  static const Histogram::BucketBoundaries buckets = {
      0.0001, 0.00016, 0.00025, 0.0004, 0.00063, 0.001, 0.0016, 0.0025, 0.004, 0.0063,
      0.01,   0.016,   0.025,   0.04,   0.063,   0.1,   0.16,   0.25,   0.4,   0.63,
      1.0,    1.6,     2.5,     4.0,    6.3,     10.0,  16.0,   25.0,   40.0,  60.0};
  return buckets;
}

const Histogram::BucketBoundaries& RpcBuckets() {
  static const Histogram::BucketBoundaries buckets = {0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005,
                                                      0.01,   0.025,   0.05,   0.1,   0.25,   0.5,
                                                      1.0,    2.5,     5.0,    10.0,  25.0,   60.0};
  return buckets;
}

const Histogram::BucketBoundaries& CheckpointBuckets() {
  static const Histogram::BucketBoundaries buckets = {0.01, 0.025, 0.05, 0.1, 0.25, 0.5,  1.0,
                                                      2.5,  5.0,   10.0, 25., 60.,  150., 300.};
  return buckets;
}

Family<Counter>& CounterFamily(Registry& registry, const char* name, const char* help) {
  return prometheus::BuildCounter().Name(name).Help(help).Register(registry);
}
Family<Gauge>& GaugeFamily(Registry& registry, const char* name, const char* help) {
  return prometheus::BuildGauge().Name(name).Help(help).Register(registry);
}
Family<Histogram>& HistogramFamily(Registry& registry, const char* name, const char* help) {
  return prometheus::BuildHistogram().Name(name).Help(help).Register(registry);
}
Gauge* OneGauge(Registry& registry, const char* name, const char* help) {
  return &GaugeFamily(registry, name, help).Add({});
}

double UnixSeconds() {
  return std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
}

}  // namespace

void RpcMethodMetrics::Started() { started_->Increment(); }

void RpcMethodMetrics::Handled(int code, double seconds) {
  if (code < 0 || code >= static_cast<int>(kCodes)) code = kCodeUnknown;
  std::atomic<Counter*>& slot = handled_[static_cast<size_t>(code)];
  Counter* counter = slot.load(std::memory_order_acquire);
  if (counter == nullptr) {
    // Two threads may both come here; Add gives both the same counter.
    counter = &handled_family_->Add({{"grpc_service", service_},
                                     {"grpc_method", method_},
                                     {"grpc_type", type_},
                                     {"grpc_code", kCodeNames[code]}});
    slot.store(counter, std::memory_order_release);
  }
  counter->Increment();
  seconds_->Observe(seconds);
}

class MetricSet::Refreshing final : public prometheus::Collectable {
 public:
  explicit Refreshing(std::shared_ptr<Registry> registry) : registry_(std::move(registry)) {}
  std::vector<prometheus::MetricFamily> Collect() const override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (refresh_own_) refresh_own_();
      if (refresh_) refresh_();
    }
    return registry_->Collect();
  }
  void SetOwn(std::function<void()> refresh) {
    std::lock_guard<std::mutex> lock(mutex_);
    refresh_own_ = std::move(refresh);
  }
  void Set(std::function<void()> refresh) {
    std::lock_guard<std::mutex> lock(mutex_);
    refresh_ = std::move(refresh);
  }

 private:
  std::shared_ptr<Registry> registry_;
  mutable std::mutex mutex_;
  std::function<void()> refresh_own_, refresh_;  // guarded by mutex_
};

MetricSet::MetricSet(const BuildInfo& build, size_t logged_steps)
    : registry_(std::make_shared<Registry>()),
      collectable_(std::make_shared<Refreshing>(registry_)),
      step_log_(logged_steps) {
  Registry& r = *registry_;

  auto& steps = CounterFamily(r, "lamina_steps_total", "Steps that were done, by direction.");
  auto& samples = CounterFamily(r, "lamina_samples_total", "Sequences that steps processed.");
  auto& tokens = CounterFamily(r, "lamina_tokens_total",
                               "Tokens (B * S, or those of a packed batch) that steps processed: "
                               "real ones, and padding.");
  auto& flops = CounterFamily(
      r, "lamina_flops_total",
      "Floating-point operations of the steps' products: forward 2T(4H^2 + 2HI) + 4H sum(S^2) a "
      "layer over its T tokens in sequences of S, backward twice that.");
  auto& achieved = GaugeFamily(r, "lamina_achieved_flops_per_second",
                               "FLOP/s of the last step while it computed.");
  auto& mfu = GaugeFamily(r, "lamina_mfu_ratio",
                          "Model FLOPs utilization of the last step while it computed: its FLOP/s "
                          "by the device's peak for its dtype; 0: no peak is known.");
  auto& seconds =
      HistogramFamily(r, "lamina_step_duration_seconds", "Where steps' time went, in seconds.");
  for (size_t d = 0; d < kStepDirections; ++d) {
    const char* const name = Name(static_cast<StepDirection>(d));
    const prometheus::Labels labels = {{"direction", name}};
    PerDirection& direction = directions_[d];
    direction.steps = &steps.Add(labels);
    direction.samples = &samples.Add(labels);
    direction.real_tokens = &tokens.Add({{"direction", name}, {"kind", "real"}});
    direction.padding_tokens = &tokens.Add({{"direction", name}, {"kind", "padding"}});
    direction.flops = &flops.Add(labels);
    direction.achieved = &achieved.Add(labels);
    direction.mfu = &mfu.Add(labels);
    for (size_t p = 0; p < kStepPhases; ++p)
      direction.seconds[p] =
          &seconds.Add({{"direction", name}, {"phase", kPhaseNames[p]}}, StepBuckets());
  }
  auto& peaks = GaugeFamily(r, "lamina_device_peak_flops_per_second",
                            "What the device can do at most, by dtype: as its maker says, or as "
                            "measured here; 0: not known yet.");
  for (size_t t = 0; t < kComputeTypes; ++t)
    peaks_[t].flops = &peaks.Add({{"dtype", kComputeTypeNames[t]}});
  skipped_steps_ = &CounterFamily(r, "lamina_skipped_steps_total",
                                  "Optimizer steps skipped because a gradient was not finite.")
                        .Add({});
  gradient_norm_ = OneGauge(r, "lamina_gradient_norm",
                            "L2 norm of the last optimizer step's unscaled gradients, before "
                            "clipping.");

  loss_scale_ = OneGauge(r, "lamina_loss_scale",
                         "What the next loss is to be multiplied by, after the last optimizer "
                         "step; 0: none yet.");
  auto& scale_changes =
      CounterFamily(r, "lamina_loss_scale_changes_total",
                    "Optimizer steps after which a dynamic loss scale grew or backed off.");
  loss_scale_growths_ = &scale_changes.Add({{"change", "growth"}});
  loss_scale_backoffs_ = &scale_changes.Add({{"change", "backoff"}});

  auto& tensor_bytes = CounterFamily(r, "lamina_tensor_bytes_total",
                                     "Bytes of tensors that calls carried, by transport and role.");
  for (size_t c = 0; c < kTensorCarriers; ++c)
    for (size_t role = 0; role < 2; ++role)
      tensor_bytes_[c][role] =
          &tensor_bytes.Add({{"transport", kCarrierNames[c]}, {"role", kRoleNames[role]}});

  queue_depth_ = OneGauge(r, "lamina_queue_depth", "Calls that wait for the device thread.");
  auto& rejections = CounterFamily(r, "lamina_admission_rejections_total",
                                   "Calls that were turned away with nothing changed.");
  for (size_t i = 0; i < kRejections; ++i)
    rejections_[i] = &rejections.Add({{"reason", kRejectionNames[i]}});

  auto& memory = GaugeFamily(r, "lamina_device_memory_bytes",
                             "Device memory that stacks have allocated, by what it is for.");
  for (size_t i = 0; i < kDeviceMemoryKinds; ++i)
    device_memory_[i] = &memory.Add({{"kind", kMemoryKindNames[i]}});
  device_capacity_ =
      OneGauge(r, "lamina_device_memory_capacity_bytes", "The device's memory, all of it.");
  device_free_ =
      OneGauge(r, "lamina_device_memory_free_bytes", "What no process has of the device's memory.");
  auto& held = GaugeFamily(r, "lamina_session_memory_bytes",
                           "What the sessions hold that hold the most, and all others together.");
  for (size_t i = 0; i < session_memory_.size(); ++i) {
    const std::string rank = i < kRankedSessions ? absl::StrCat(i + 1) : "rest";
    session_memory_[i] = {&held.Add({{"rank", rank}, {"kind", "regions"}}),
                          &held.Add({{"rank", rank}, {"kind", "activations"}})};
  }
  activations_ = OneGauge(r, "lamina_activation_bytes_in_use",
                          "Bytes of the context arenas that outstanding contexts take.");
  activations_high_water_ =
      OneGauge(r, "lamina_activation_bytes_high_water",
               "Sum over live stacks of the most bytes that their contexts ever took.");
  stacks_ = OneGauge(r, "lamina_stacks", "Stacks that exist.");
  contexts_ = OneGauge(r, "lamina_contexts", "Activation contexts that wait for their Backward.");
  sessions_ = OneGauge(r, "lamina_sessions", "Live sessions.");
  adrift_ = OneGauge(r, "lamina_sessions_adrift",
                     "Live sessions whose KeepAlive stream broke and that can be resumed.");
  regions_ = OneGauge(r, "lamina_regions", "Live shared-memory regions.");
  region_bytes_ = OneGauge(r, "lamina_region_bytes", "Bytes of live shared-memory regions.");
  device_regions_ = OneGauge(r, "lamina_device_regions", "Live regions in device memory.");
  device_region_bytes_ =
      OneGauge(r, "lamina_device_region_bytes", "Bytes of live regions in device memory.");
  auto& ended =
      CounterFamily(r, "lamina_sessions_ended_total", "Sessions that ended, by what ended them.");
  for (const char* reason : kSessionEndNames)
    session_ends_.emplace_back(reason, &ended.Add({{"reason", reason}}));
  auto& resumed = CounterFamily(r, "lamina_sessions_resumed_total",
                                "KeepAlive streams that resumed a session, by what became of the "
                                "stream before.");
  for (size_t i = 0; i < kResumptions; ++i)
    resumptions_[i] = &resumed.Add({{"after", kResumptionNames[i]}});

  auto& checkpoints = HistogramFamily(r, "lamina_checkpoint_duration_seconds",
                                      "Time of a checkpoint's save or load, in seconds.");
  auto& failures = CounterFamily(r, "lamina_checkpoint_failures_total",
                                 "Checkpoints that could not be saved or loaded.");
  for (size_t op = 0; op < 2; ++op) {
    checkpoint_seconds_[op] =
        &checkpoints.Add({{"op", kCheckpointOpNames[op]}}, CheckpointBuckets());
    checkpoint_failures_[op] = &failures.Add({{"op", kCheckpointOpNames[op]}});
  }
  checkpoints_enabled_ =
      OneGauge(r, "lamina_checkpoints_enabled", "1 where there is a folder for checkpoints.");
  checkpoint_bytes_ =
      OneGauge(r, "lamina_checkpoint_bytes", "Size of the last checkpoint that was saved.");
  checkpoint_timestamp_ =
      OneGauge(r, "lamina_checkpoint_last_success_timestamp_seconds",
               "Unix time at which the last checkpoint was saved; 0: none yet.");
  checkpoint_age_ = OneGauge(r, "lamina_checkpoint_age_seconds",
                             "Time since the last checkpoint was saved, or since the start where "
                             "none was.");

  serving_ = OneGauge(r, "lamina_serving", "1 while the daemon takes calls, else 0.");
  GaugeFamily(r, "lamina_build_info", "Always 1; the labels say what runs where.")
      .Add({{"version", build.version},
            {"commit", build.commit},
            {"backend", build.backend},
            {"device", build.device}})
      .Set(1);
  GaugeFamily(r, "lamina_device_info", "Always 1; UUID is what dcgm-exporter calls the card.")
      .Add({{"UUID", build.uuid},
            {"backend", build.backend},
            {"device", build.device},
            {"ordinal", absl::StrCat(build.ordinal)}})
      .Set(1);
  process_ = std::make_unique<ProcessMetrics>(r);

  rpc_started_ =
      &CounterFamily(r, "grpc_server_started_total", "RPCs that the server has started.");
  rpc_handled_ = &CounterFamily(r, "grpc_server_handled_total",
                                "RPCs that the server has completed, by status code.");
  rpc_seconds_ = &HistogramFamily(r, "grpc_server_handling_seconds",
                                  "Time from an RPC's start to its end on the server, in seconds.");
  collectable_->SetOwn([this, started = UnixSeconds()] {
    const double saved = checkpoint_timestamp_->Value();
    checkpoint_age_->Set(std::max(0.0, UnixSeconds() - (saved > 0 ? saved : started)));
    process_->Read();
  });
}

// A scrape may hold the collectable longer than this lives.
MetricSet::~MetricSet() {
  collectable_->Set(nullptr);
  collectable_->SetOwn(nullptr);
}

void MetricSet::StepDone(StepDirection direction, const StepSample& sample) {
  PerDirection& d = directions_[static_cast<size_t>(direction)];
  d.steps->Increment();
  if (sample.samples > 0) d.samples->Increment(sample.samples);
  if (sample.tokens > 0) d.real_tokens->Increment(sample.tokens - sample.padding_tokens);
  if (sample.padding_tokens > 0) d.padding_tokens->Increment(sample.padding_tokens);
  if (sample.flops > 0) {
    d.flops->Increment(sample.flops);
    if (sample.compute_seconds > 0) {
      const double achieved = sample.flops / sample.compute_seconds;
      d.achieved->Set(achieved);
      Peak& peak = peaks_[static_cast<size_t>(sample.type)];
      double most = peak.flops->Value();
      if (most > 0) {
        if (achieved > most && peak.measured.load(std::memory_order_relaxed))
          peak.flops->Set(most = achieved);
        d.mfu->Set(achieved / most);
      }
    }
  }
  const double seconds[kStepPhases] = {sample.queue_seconds, sample.input_seconds,
                                       sample.compute_seconds, sample.output_seconds,
                                       sample.total_seconds};
  for (size_t p = 0; p < kStepPhases; ++p) d.seconds[p]->Observe(seconds[p]);
  StepRecord record{.ended = UnixSeconds(),
                    .queue = sample.queue_seconds,
                    .input = sample.input_seconds,
                    .compute = sample.compute_seconds,
                    .output = sample.output_seconds,
                    .total = sample.total_seconds,
                    .samples = sample.samples,
                    .tokens = sample.tokens,
                    .padding_tokens = sample.padding_tokens,
                    .flops = sample.flops,
                    .session = sample.session,
                    .request_item = sample.request_item,
                    .direction = direction};
  SetText(record.stack, sample.stack);
  SetText(record.request_id, sample.request_id);
  SetText(record.trace_id, sample.trace_id);
  step_log_.Add(record);
}

void MetricSet::SetPeakFlops(ComputeType type, double flops_per_second, bool measured) {
  Peak& peak = peaks_[static_cast<size_t>(type)];
  peak.measured.store(measured, std::memory_order_relaxed);
  peak.flops->Set(flops_per_second);
}

double MetricSet::peak_flops(ComputeType type) const {
  return peaks_[static_cast<size_t>(type)].flops->Value();
}

void MetricSet::GradientsApplied(const AppliedStep& step) {
  if (step.skipped) skipped_steps_->Increment();
  gradient_norm_->Set(step.norm);
  loss_scale_->Set(step.next_loss_scale);
  if (step.scale_grew) loss_scale_growths_->Increment();
  if (step.scale_backed_off) loss_scale_backoffs_->Increment();
}

void MetricSet::TensorMoved(TensorCarrier carrier, TensorRole role, size_t bytes) {
  tensor_bytes_[static_cast<size_t>(carrier)][static_cast<size_t>(role)]->Increment(
      static_cast<double>(bytes));
}

void MetricSet::SetQueueDepth(int64_t calls) { queue_depth_->Set(static_cast<double>(calls)); }

int64_t MetricSet::queue_depth() const { return static_cast<int64_t>(queue_depth_->Value()); }

void MetricSet::Rejected(Rejection reason) {
  rejections_[static_cast<size_t>(reason)]->Increment();
}

void MetricSet::SetDeviceMemory(const std::array<size_t, kDeviceMemoryKinds>& bytes) {
  for (size_t i = 0; i < kDeviceMemoryKinds; ++i)
    device_memory_[i]->Set(static_cast<double>(bytes[i]));
}

void MetricSet::SetActivations(size_t bytes_in_use, size_t bytes_high_water) {
  activations_->Set(static_cast<double>(bytes_in_use));
  activations_high_water_->Set(static_cast<double>(bytes_high_water));
}

void MetricSet::SetDeviceCapacity(size_t bytes) {
  device_capacity_->Set(static_cast<double>(bytes));
}
void MetricSet::SetDeviceFree(size_t bytes) { device_free_->Set(static_cast<double>(bytes)); }

void MetricSet::SetSessionMemory(std::vector<SessionMemory> sessions) {
  const auto holds = [](const SessionMemory& s) { return s.region_bytes + s.activation_bytes; };
  std::sort(sessions.begin(), sessions.end(),
            [&](const SessionMemory& a, const SessionMemory& b) { return holds(a) > holds(b); });
  std::array<SessionMemory, kRankedSessions + 1> ranked{};
  for (size_t i = 0; i < sessions.size(); ++i) {
    SessionMemory& rank = ranked[std::min(i, kRankedSessions)];
    rank.region_bytes += sessions[i].region_bytes;
    rank.activation_bytes += sessions[i].activation_bytes;
  }
  for (size_t i = 0; i < ranked.size(); ++i) {
    session_memory_[i].regions->Set(static_cast<double>(ranked[i].region_bytes));
    session_memory_[i].activations->Set(static_cast<double>(ranked[i].activation_bytes));
  }
}

void MetricSet::SetStacks(int64_t stacks) { stacks_->Set(static_cast<double>(stacks)); }
void MetricSet::SetContexts(int64_t contexts) { contexts_->Set(static_cast<double>(contexts)); }

void MetricSet::SetSessions(int64_t sessions, int64_t adrift, int64_t regions,
                            size_t region_bytes) {
  sessions_->Set(static_cast<double>(sessions));
  adrift_->Set(static_cast<double>(adrift));
  regions_->Set(static_cast<double>(regions));
  region_bytes_->Set(static_cast<double>(region_bytes));
}

void MetricSet::SetDeviceRegions(int64_t regions, size_t bytes) {
  device_regions_->Set(static_cast<double>(regions));
  device_region_bytes_->Set(static_cast<double>(bytes));
}

void MetricSet::SessionEnded(absl::string_view reason) {
  for (const auto& [name, counter] : session_ends_) {
    if (name != reason) continue;
    counter->Increment();
    return;
  }
  session_ends_.back().second->Increment();
}

void MetricSet::SessionResumed(Resumption how) {
  resumptions_[static_cast<size_t>(how)]->Increment();
}

void MetricSet::SetCheckpointsEnabled(bool enabled) { checkpoints_enabled_->Set(enabled ? 1 : 0); }

void MetricSet::CheckpointFailed(CheckpointOp op) {
  checkpoint_failures_[static_cast<size_t>(op)]->Increment();
}

double MetricSet::last_checkpoint() const { return checkpoint_timestamp_->Value(); }

void MetricSet::CheckpointDone(CheckpointOp op, double seconds, uint64_t bytes) {
  checkpoint_seconds_[static_cast<size_t>(op)]->Observe(seconds);
  if (op != CheckpointOp::kSave) return;
  checkpoint_bytes_->Set(static_cast<double>(bytes));
  checkpoint_timestamp_->Set(UnixSeconds());
}

void MetricSet::SetServing(bool serving) { serving_->Set(serving ? 1 : 0); }

RpcMethodMetrics& MetricSet::Rpc(const std::string& service, const std::string& method,
                                 const std::string& type) {
  std::lock_guard<std::mutex> lock(rpc_mutex_);
  std::unique_ptr<RpcMethodMetrics>& rpc = rpcs_[absl::StrCat(service, "/", method)];
  if (rpc == nullptr) {
    const prometheus::Labels labels = {
        {"grpc_service", service}, {"grpc_method", method}, {"grpc_type", type}};
    rpc = std::make_unique<RpcMethodMetrics>();
    rpc->service_ = service;
    rpc->method_ = method;
    rpc->type_ = type;
    rpc->handled_family_ = rpc_handled_;
    rpc->started_ = &rpc_started_->Add(labels);
    rpc->seconds_ = &rpc_seconds_->Add(labels, RpcBuckets());
  }
  return *rpc;
}

void MetricSet::SetRefresh(std::function<void()> refresh) { collectable_->Set(std::move(refresh)); }

std::shared_ptr<prometheus::Collectable> MetricSet::collectable() const { return collectable_; }

std::string MetricSet::Text() const {
  return prometheus::TextSerializer().Serialize(collectable_->Collect());
}

}  // namespace lamina
