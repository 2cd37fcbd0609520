// Every metric that the daemon exports, made in one place. docs/metrics.md describes each.
//
// Callers say what happened in types of their own; names and label values live in metrics.cc alone,
// so the set of series is bounded by what the enums below can say (and by the RPC methods that are
// registered). Time series are looked up at construction: an observation costs a few atomic
// operations, and a histogram's its mutex.
//
// Threads: all methods from any thread.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "prometheus/collectable.h"
#include "prometheus/counter.h"
#include "prometheus/family.h"
#include "prometheus/gauge.h"
#include "prometheus/histogram.h"
#include "prometheus/registry.h"

namespace lamina {

enum class StepDirection : uint8_t { kForwardEval, kForwardTraining, kBackward, kApply };
inline constexpr size_t kStepDirections = 4;

// Where a step's time went; kTotal is from admission to the result.
enum class StepPhase : uint8_t { kQueue, kInput, kCompute, kOutput, kTotal };
inline constexpr size_t kStepPhases = 5;

// Kinds of device memory, in the order of lamina::MemoryKind.
inline constexpr size_t kDeviceMemoryKinds = 8;

enum class TensorCarrier : uint8_t { kInline, kMemfd, kDevice };
inline constexpr size_t kTensorCarriers = 3;
enum class TensorRole : uint8_t { kInput, kOutput };

// Why a call was turned away with nothing changed.
enum class Rejection : uint8_t {
  kQueueFull,
  kDeadline,   // passed while the call waited
  kCancelled,  // while the call waited
  kDraining,
  kDeviceFailed,
  kStackMemory,    // a stack's plan does not fit
  kContextMemory,  // no room for an activation context
};
inline constexpr size_t kRejections = 7;

// What became of a session's KeepAlive stream before the one that resumes it: it broke, or it stood
// still (as one does whose client lost it unnoticed here) and was taken over.
enum class Resumption : uint8_t { kBreak, kTakeover };
inline constexpr size_t kResumptions = 2;

enum class CheckpointOp : uint8_t { kSave, kLoad };

// One step that was done. Counts that a direction has not are zero.
struct StepSample {
  double samples = 0;  // sequences: B, or n of a packed batch
  double tokens = 0;   // B * S, or T of a packed batch
  double flops = 0;    // as Stack::ForwardFlops counts them
  double queue_seconds = 0, input_seconds = 0, compute_seconds = 0, output_seconds = 0;
  double total_seconds = 0;
};

// What came of one optimizer step.
struct AppliedStep {
  bool skipped = false;        // a gradient was not finite
  double norm = 0;             // of the gradients; may be infinite or NaN where it was skipped
  double next_loss_scale = 1;  // what to multiply the next loss by
  bool scale_grew = false, scale_backed_off = false;  // a dynamic one, by this step
};

struct BuildInfo {
  std::string version;  // "0.1.0"
  std::string commit;   // empty: unknown
  std::string backend;  // "cpu" or "cuda"
  std::string device;   // the device's own name
};

// Counts one RPC method's calls under the names that gRPC dashboards know.
class RpcMethodMetrics {
 public:
  void Started();
  // `code`: the gRPC status code's number; what is not one counts as UNKNOWN.
  void Handled(int code, double seconds);

 private:
  friend class MetricSet;
  static constexpr size_t kCodes = 17;
  std::string service_, method_, type_;
  prometheus::Family<prometheus::Counter>* handled_family_ = nullptr;
  prometheus::Counter* started_ = nullptr;
  prometheus::Histogram* seconds_ = nullptr;
  std::array<std::atomic<prometheus::Counter*>, kCodes> handled_{};  // made when first needed
};

class MetricSet {
 public:
  explicit MetricSet(const BuildInfo& build);
  MetricSet(const MetricSet&) = delete;
  MetricSet& operator=(const MetricSet&) = delete;

  // --- steps ---
  void StepDone(StepDirection direction, const StepSample& sample);
  void GradientsApplied(const AppliedStep& step);
  void TensorMoved(TensorCarrier carrier, TensorRole role, size_t bytes);

  // --- admission ---
  void SetQueueDepth(int64_t calls);
  void Rejected(Rejection reason);

  // --- memory and what lives ---
  void SetDeviceMemory(const std::array<size_t, kDeviceMemoryKinds>& bytes);
  void SetActivations(size_t bytes_in_use, size_t bytes_high_water);
  void SetStacks(int64_t stacks);
  void SetContexts(int64_t contexts);
  // `adrift`: those of the sessions whose keeper broke and that can be resumed.
  void SetSessions(int64_t sessions, int64_t adrift, int64_t regions, size_t region_bytes);
  // Of all sessions, in device memory; SetSessions counts those in the host's.
  void SetDeviceRegions(int64_t regions, size_t bytes);
  // `reason` as the session manager says it; one that is not known counts as "other".
  void SessionEnded(absl::string_view reason);
  void SessionResumed(Resumption how);

  // --- checkpoints ---
  void CheckpointDone(CheckpointOp op, double seconds, uint64_t bytes);

  // --- the daemon ---
  void SetServing(bool serving);

  // --- RPCs ---
  // `type`: "unary", "client_stream", "server_stream" or "bidi_stream". The same pair again gives
  // the same object, which lives as long as this.
  RpcMethodMetrics& Rpc(const std::string& service, const std::string& method,
                        const std::string& type);

  // What a scrape collects. `refresh` runs before each one, for values that are read rather than
  // reported; empty: none. When this returns, no earlier `refresh` is running any more.
  void SetRefresh(std::function<void()> refresh);
  std::shared_ptr<prometheus::Collectable> collectable() const;
  // All of it in the text format, as a scrape would see it.
  std::string Text() const;

 private:
  class Refreshing;

  std::shared_ptr<prometheus::Registry> registry_;
  std::shared_ptr<Refreshing> collectable_;

  struct PerDirection {
    prometheus::Counter *steps, *samples, *tokens, *flops;
    prometheus::Gauge* achieved;
    std::array<prometheus::Histogram*, kStepPhases> seconds;
  };
  std::array<PerDirection, kStepDirections> directions_{};
  std::array<std::array<prometheus::Counter*, 2>, kTensorCarriers>
      tensor_bytes_{};  // [carrier][role]
  std::array<prometheus::Counter*, kRejections> rejections_{};
  std::array<prometheus::Gauge*, kDeviceMemoryKinds> device_memory_{};
  std::array<prometheus::Histogram*, 2> checkpoint_seconds_{};
  std::vector<std::pair<std::string, prometheus::Counter*>> session_ends_;
  std::array<prometheus::Counter*, kResumptions> resumptions_{};
  prometheus::Counter *skipped_steps_, *loss_scale_growths_, *loss_scale_backoffs_;
  prometheus::Gauge *gradient_norm_, *loss_scale_;
  prometheus::Gauge *queue_depth_, *activations_, *activations_high_water_;
  prometheus::Gauge *stacks_, *contexts_, *sessions_, *adrift_, *regions_, *region_bytes_;
  prometheus::Gauge *device_regions_, *device_region_bytes_;
  prometheus::Gauge *checkpoint_bytes_, *checkpoint_timestamp_, *serving_;

  prometheus::Family<prometheus::Counter>* rpc_started_;
  prometheus::Family<prometheus::Counter>* rpc_handled_;
  prometheus::Family<prometheus::Histogram>* rpc_seconds_;
  std::mutex rpc_mutex_;
  // "service/method" -> its counters; guarded by rpc_mutex_
  std::map<std::string, std::unique_ptr<RpcMethodMetrics>> rpcs_;
};

}  // namespace lamina
