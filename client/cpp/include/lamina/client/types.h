// Plain values of the client library: element types, configs, plans, and what the daemon tells
// about itself and its stacks. Nothing here owns memory beyond its own members.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace lamina::client {

// Element type of a tensor; little-endian, dense.
enum class DType : int { kFloat32 = 1, kBFloat16 = 2, kFloat16 = 3, kInt32 = 4 };
const char* Name(DType dtype);  // "fp32", "bf16", "fp16", "int32"
size_t SizeOf(DType dtype);     // bytes of an element
// Takes "fp32", "float32", "bf16", "bfloat16", "fp16", "float16", "int32"; nullopt for others.
std::optional<DType> ParseDType(std::string_view name);

// How a tensor crossed to or from the daemon.
enum class Transport : int { kNone = 0, kInline = 1, kMemfd = 2, kDevice = 3, kPosix = 4 };
const char* Name(Transport transport);  // "none", "inline", "memfd", ...

// The GELU's form: x * Phi(x) (BERT's) or its tanh approximation (DeepSpeed's).
enum class Gelu : int { kErf = 1, kTanh = 2 };
const char* Name(Gelu gelu);  // "erf", "tanh"
std::optional<Gelu> ParseGelu(std::string_view name);

// Which attention kernel a call ran: the fast one (on a GPU's matrix units; on the CPU always), or
// a GPU's general one for every dtype and head dim.
enum class AttentionPath : int { kNone = 0, kFused = 1, kPlain = 2 };
const char* Name(AttentionPath path);  // "none", "fused", "plain"

// The optimizer's rule: Adam with decoupled weight decay, or that scaled for each tensor by
// ||w|| / ||update||.
enum class OptimizerKind : int { kAdamW = 1, kLamb = 2 };
const char* Name(OptimizerKind kind);  // "adamw", "lamb"
std::optional<OptimizerKind> ParseOptimizer(std::string_view name);

// Extents, outermost first; each >= 1, at most four.
using Shape = std::vector<int64_t>;
std::string ToString(const Shape& shape);  // "[8, 128, 256]"

// What a stack is: the settings of DeepSpeed's transformer layer under their own names, and ours.
// The daemon checks every field; its error names the field, the value and the range.
struct StackConfig {
  int64_t batch_size = 0;             // largest B of a call, >= 1
  int64_t max_seq_length = 0;         // largest S of a call, >= 1
  int64_t hidden_size = 0;            // H, divisible by heads
  int64_t intermediate_size = -1;     // I; -1: 4 * hidden_size
  int64_t heads = 0;                  // A
  int64_t num_hidden_layers = 0;      // L
  double attn_dropout_ratio = 0.0;    // p in [0, 1), on the attention probabilities
  double hidden_dropout_ratio = 0.0;  // p in [0, 1), on the two sub-layer outputs
  double initializer_range = 0.02;    // standard deviation of the initial weights, >= 0
  double layer_norm_eps = 1e-12;      // > 0
  int local_rank = -1;                // device ordinal that the stack must be on; -1: the daemon's
  int64_t seed = -1;                  // >= 0; -1: the daemon draws one and reports it
  bool fp16 = false;                  // DeepSpeed's name for dtype = kFloat16
  DType dtype = DType::kFloat32;      // weights and activations: fp32, bf16 or fp16
  bool pre_layer_norm = true;         // norm before each sub-layer, or after the residual sum
  // Memory flags: less is kept for Backward, which computes it again. Any combination.
  bool normalize_invertible = false;     // not the norms' inputs
  bool gelu_checkpoint = false;          // not the GELU's output
  bool attn_dropout_checkpoint = false;  // no effect: fused attention keeps nothing of it anyway
  bool stochastic_mode = false;          // sums over tokens may be added in any order
  bool adjust_init_range = true;         // the two output matrices' deviation is range / sqrt(2L)
  bool training = true;  // false: no gradients, optimizer state or contexts are kept
  Gelu gelu = Gelu::kErf;
  int64_t max_contexts = 2;               // contexts at full batch_size x max_seq_length that fit
  bool activation_checkpointing = false;  // a memory flag: nothing but each layer's input
  bool causal = false;                    // token s attends to tokens 0..s alone
  // The daemon finds the loss scale: multiply each loss by StackInfo::loss_scale or by the last
  // ApplyResult::next_loss_scale.
  bool dynamic_loss_scale = false;
  double initial_loss_scale = 65536.0;        // a power of two in [min_loss_scale, 2^24]
  int64_t loss_scale_growth_interval = 1000;  // clean steps before it grows, >= 1
  double loss_scale_growth_factor = 2.0;      // > 1
  double loss_scale_backoff_factor = 0.5;     // in (0, 1)
  int64_t loss_scale_hysteresis = 2;          // overflows until it backs off, >= 1
  double min_loss_scale = 1.0;                // where backing off ends, > 0
};

// What memory is for.
enum class MemoryKind : int {
  kUnknown = 0,
  kWeights = 1,
  kMasterWeights = 2,
  kGradients = 3,
  kOptimizer = 4,
  kActivations = 5,
  kWorkspace = 6,
  kStaging = 7,
  kGraphs = 8,
};
const char* Name(MemoryKind kind);  // "weights", "master_weights", ...

struct MemoryPlanEntry {
  MemoryKind kind = MemoryKind::kUnknown;
  std::string name;    // which buffer
  uint64_t bytes = 0;  // all instances together, alignment included
  int64_t instances = 0;
};

// What a stack allocates, to the byte.
struct MemoryPlan {
  std::vector<MemoryPlanEntry> entries;
  uint64_t total_bytes = 0;
  uint64_t context_bytes = 0;  // one context of all layers at full batch_size x max_seq_length

  uint64_t Bytes(MemoryKind kind) const;  // sum of the entries of that kind
};

// Client::PlanMemory's answer.
struct PlanResult {
  MemoryPlan plan;
  uint64_t device_free_bytes = 0;  // free on the device now, about
  bool fits = false;               // whether the plan fits into that
};

struct ParameterInfo {
  std::string name;  // "layers.<i>.<name>"
  Shape shape;       // [out, in] or [out]
};

// A stack as it was when the daemon answered.
struct StackInfo {
  std::string name;
  StackConfig config;  // every default filled in
  MemoryPlan plan;
  int64_t parameter_count = 0;            // trainable values
  int64_t step = 0;                       // optimizer steps applied
  int64_t skipped_steps = 0;              // steps skipped because a gradient was not finite
  uint64_t forward_count = 0;             // training Forwards so far
  int64_t outstanding_contexts = 0;       // contexts that wait for their Backward
  double loss_scale = 1;                  // what to multiply the next loss by
  std::vector<ParameterInfo> parameters;  // stored ones; filled by GetStack and OpenStack alone
};

// What can change on a live stack; absent fields stay as they are.
struct StackUpdate {
  std::optional<double> attn_dropout_ratio{};    // p in [0, 1)
  std::optional<double> hidden_dropout_ratio{};  // p in [0, 1)
  std::optional<bool> training{};
  // The memory flags and stochastic_mode: see StackConfig.
  std::optional<bool> normalize_invertible{};
  std::optional<bool> gelu_checkpoint{};
  std::optional<bool> attn_dropout_checkpoint{};
  std::optional<bool> activation_checkpointing{};
  std::optional<bool> stochastic_mode{};
};

// What a daemon is and offers.
struct ServerInfo {
  std::string version;
  std::string build_commit;  // empty when unknown
  std::string backend;       // "cpu" or "cuda"
  std::string device_name;
  std::string device_uuid;  // empty on the CPU
  int device_ordinal = 0;
  uint64_t device_total_bytes = 0;
  uint64_t device_free_bytes = 0;
  uint64_t inline_cap_bytes = 0;  // largest inline tensor
  int replay_window = 0;          // answers kept for repeats, a session
  std::vector<Transport> transports;
  double uptime_seconds = 0;
  bool checkpoints_enabled = false;
  std::string metrics_address;  // HOST:PORT of /metrics and /statusz; empty: none
};

// What the daemon's health service says.
enum class Health : int { kUnknown = 0, kServing = 1, kNotServing = 2, kServiceUnknown = 3 };
const char* Name(Health health);  // "SERVING", ...

struct SavedCheckpoint {
  std::string path;  // as the daemon sees it
  uint64_t bytes = 0;
  int64_t step = 0;  // optimizer steps at that point
};

// Layers [begin, end) of a stack.
struct LayerRange {
  int64_t begin = 0;
  int64_t end = 0;
};

// Where a call's time went on the daemon, in seconds.
struct StepTiming {
  double queue_seconds = 0;    // waiting for the device thread
  double input_seconds = 0;    // moving inputs to the device; 0 where kernels read the region
  double compute_seconds = 0;  // running the layers
  double output_seconds = 0;   // moving results back; 0 where kernels write the region
};

}  // namespace lamina::client
