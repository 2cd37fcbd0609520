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
#include "server/metrics/step_log.h"

namespace lamina {

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

// The dtypes that a stack computes in.
enum class ComputeType : uint8_t { kF32, kBF16, kF16 };
inline constexpr size_t kComputeTypes = 3;

// One step that was done. Counts that a direction has not are zero.
struct StepSample {
  double samples = 0;         // sequences: B, or n of a packed batch
  double tokens = 0;          // B * S, or T of a packed batch
  double padding_tokens = 0;  // those of them that lengths or a mask hide
  double flops = 0;           // as Stack::ForwardFlops counts them
  ComputeType type = ComputeType::kF32;
  double queue_seconds = 0, input_seconds = 0, compute_seconds = 0, output_seconds = 0;
  double total_seconds = 0;
  // For the log of steps alone.
  absl::string_view stack;
  uint64_t session = 0;
  absl::string_view request_id, trace_id;
  uint64_t request_item = 0;
};

// What one session holds.
struct SessionMemory {
  size_t region_bytes = 0;
  size_t activation_bytes = 0;
};
// Sessions that have series of their own, by how much they hold; the rest share one.
inline constexpr size_t kRankedSessions = 5;

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
  std::string uuid;     // "GPU-..."; empty on the CPU
  int ordinal = 0;
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

class ProcessMetrics;

class MetricSet {
 public:
  static constexpr size_t kLoggedSteps = 1024;

  // `logged_steps`: how many single steps are remembered.
  explicit MetricSet(const BuildInfo& build, size_t logged_steps = kLoggedSteps);
  ~MetricSet();
  MetricSet(const MetricSet&) = delete;
  MetricSet& operator=(const MetricSet&) = delete;

  // --- steps ---
  void StepDone(StepDirection direction, const StepSample& sample);
  void GradientsApplied(const AppliedStep& step);
  void TensorMoved(TensorCarrier carrier, TensorRole role, size_t bytes);
  // What the device can do at most, FLOP/s. `measured`: a step that does more raises it. 0: not
  // known, as in the beginning.
  void SetPeakFlops(ComputeType type, double flops_per_second, bool measured);
  double peak_flops(ComputeType type) const;
  const StepLog& steps() const { return step_log_; }

  // --- admission ---
  void SetQueueDepth(int64_t calls);
  int64_t queue_depth() const;
  void Rejected(Rejection reason);

  // --- memory and what lives ---
  void SetDeviceMemory(const std::array<size_t, kDeviceMemoryKinds>& bytes);
  void SetActivations(size_t bytes_in_use, size_t bytes_high_water);
  void SetStacks(int64_t stacks);
  void SetContexts(int64_t contexts);
  void SetDeviceCapacity(size_t bytes);
  void SetDeviceFree(size_t bytes);
  // Of all sessions, in any order.
  void SetSessionMemory(std::vector<SessionMemory> sessions);
  // `adrift`: those of the sessions whose keeper broke and that can be resumed.
  void SetSessions(int64_t sessions, int64_t adrift, int64_t regions, size_t region_bytes);
  // Of all sessions, in device memory; SetSessions counts those in the host's.
  void SetDeviceRegions(int64_t regions, size_t bytes);
  // `reason` as the session manager says it; one that is not known counts as "other".
  void SessionEnded(absl::string_view reason);
  void SessionResumed(Resumption how);

  // --- checkpoints ---
  void SetCheckpointsEnabled(bool enabled);
  void CheckpointDone(CheckpointOp op, double seconds, uint64_t bytes);
  void CheckpointFailed(CheckpointOp op);
  // Unix time of the last save; 0: none since the start.
  double last_checkpoint() const;

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
    prometheus::Counter *steps, *samples, *real_tokens, *padding_tokens, *flops;
    prometheus::Gauge *achieved, *mfu;
    std::array<prometheus::Histogram*, kStepPhases> seconds;
  };
  std::array<PerDirection, kStepDirections> directions_{};
  std::array<std::array<prometheus::Counter*, 2>, kTensorCarriers>
      tensor_bytes_{};  // [carrier][role]
  std::array<prometheus::Counter*, kRejections> rejections_{};
  std::array<prometheus::Gauge*, kDeviceMemoryKinds> device_memory_{};
  std::array<prometheus::Histogram*, 2> checkpoint_seconds_{};
  std::array<prometheus::Counter*, 2> checkpoint_failures_{};
  struct Peak {
    prometheus::Gauge* flops = nullptr;
    std::atomic<bool> measured{false};
  };
  std::array<Peak, kComputeTypes> peaks_{};
  struct SessionGauges {
    prometheus::Gauge *regions, *activations;
  };
  std::array<SessionGauges, kRankedSessions + 1> session_memory_{};  // the last: the rest
  std::vector<std::pair<std::string, prometheus::Counter*>> session_ends_;
  std::array<prometheus::Counter*, kResumptions> resumptions_{};
  prometheus::Counter *skipped_steps_, *loss_scale_growths_, *loss_scale_backoffs_;
  prometheus::Gauge *gradient_norm_, *loss_scale_;
  prometheus::Gauge *queue_depth_, *activations_, *activations_high_water_;
  prometheus::Gauge *stacks_, *contexts_, *sessions_, *adrift_, *regions_, *region_bytes_;
  prometheus::Gauge *device_regions_, *device_region_bytes_;
  prometheus::Gauge *device_capacity_, *device_free_;
  prometheus::Gauge *checkpoints_enabled_, *checkpoint_bytes_, *checkpoint_timestamp_;
  prometheus::Gauge *checkpoint_age_, *serving_;
  std::unique_ptr<ProcessMetrics> process_;
  StepLog step_log_;

  prometheus::Family<prometheus::Counter>* rpc_started_;
  prometheus::Family<prometheus::Counter>* rpc_handled_;
  prometheus::Family<prometheus::Histogram>* rpc_seconds_;
  std::mutex rpc_mutex_;
  // "service/method" -> its counters; guarded by rpc_mutex_
  std::map<std::string, std::unique_ptr<RpcMethodMetrics>> rpcs_;
};

}  // namespace lamina
