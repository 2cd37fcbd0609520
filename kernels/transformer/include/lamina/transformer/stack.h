// A stack of transformer encoder layers under one config, on one backend: weights, gradients,
// optimizer state, activation contexts.
//
// Layer, with LN the layer norm, drop the inverted dropout, attn the multi-head self-attention:
//   Pre-LN:   n = LN(x; norm);  a = x + drop(attn(n) Wo + bo);  y = a + drop(gelu(LN(a; attn_n) Wi
//   + bi) Wout + bout) Post-LN:  a = LN(x + drop(attn(x) Wo + bo); attn_n);        y = LN(a +
//   drop(gelu(a Wi + bi) Wout + bout); norm)
// No final norm follows the last layer.
//
// Parameters, all [out, in], one set a layer, named "layers.<i>.<name>" with DeepSpeed's names:
//   attn_qkvw [3H, H]  attn_qkvb [3H]  attn_ow [H, H]  attn_ob [H]  attn_nw [H]  attn_nb [H]
//   inter_w [I, H]  inter_b [I]  output_w [H, I]  output_b [H]  norm_w [H]  norm_b [H]
// and, as parts of the fused ones, attn_qw attn_kw attn_vw [H, H], attn_qb attn_kb attn_vb [H].
//
// Memory: everything is allocated in Create (and in Update, where that needs it); Forward, Backward
// and ApplyGradients allocate no device memory, but that a Backend may keep steps that come back
// (StepCache), up to what the plan counts as graphs. A Stack is not thread-safe: the engine's
// device thread owns it. All tensors are in the backend's memory; all calls but the Read*/Write*
// ones, ApplyGradients and Update only enqueue; with normalize_invertible the first training
// Forward after a Write* of weights waits too, to look at the norms.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "lamina/kernels/backend.h"
#include "lamina/transformer/config.h"
#include "lamina/transformer/plan.h"

namespace lamina {

struct LayerRange {
  int64_t begin = 0;
  int64_t end = 0;  // exclusive
};

// What of a parameter is meant.
enum class ParameterPart : uint8_t {
  kMaster = 0,    // fp32 master weights; writing them also rounds into the weights
  kWeights = 1,   // in the stack's dtype; writing them also sets the master
  kGradient = 2,  // fp32, accumulated since the last ZeroGradients
  kMoment1 = 3,   // fp32, the optimizer's m
  kMoment2 = 4,   // fp32, the optimizer's v
};

// Whose memory an address is of. Where the backend's is the host's, there is none but kHost.
enum class Memory : uint8_t { kHost = 0, kDevice = 1 };

struct ParameterInfo {
  std::string name;  // "layers.3.attn_qkvw"
  Shape shape;       // [out, in] or [out]
};

// What one training Forward saved: a part of the stack's context arena, freed by its destructor.
// Must not outlive its Stack.
class Context {
 public:
  virtual ~Context() = default;
  virtual LayerRange layers() const = 0;
  virtual int64_t batch() const = 0;
  virtual int64_t seq() const = 0;
  virtual size_t bytes() const = 0;
  virtual int64_t tokens() const = 0;  // B * S, or T where packed
  virtual bool packed() const = 0;
  // Of input, output and their gradients: [B, S, H], or [T, H] where packed.
  virtual Shape activation_shape() const = 0;
};

// Packed: input and output are [T, H], cu_seqlens is present, neither mask nor lengths is. T is at
// most batch_size * max_seq_length and each sequence's length at most max_seq_length; there may be
// more sequences than batch_size.
struct ForwardArgs {
  LayerRange layers;
  TensorView input;       // act [B, S, H]
  TensorView mask;        // fp32 [B, S], added to the scores of each key; absent: none
  TensorView lengths;     // int32 [B], each 1..S (the caller has checked); absent: none. Not both
  TensorView cu_seqlens;  // int32 [n + 1]: sequence i is tokens [cu[i], cu[i + 1]) (checked)
  int64_t longest = 0;    // with cu_seqlens: the longest sequence's length
  TensorView output;      // act [B, S, H]; may not overlap input
};

enum class OptimizerKind : uint8_t { kAdamW = 0, kLamb = 1 };

struct OptimizerOptions {
  OptimizerKind kind = OptimizerKind::kAdamW;
  double learning_rate = 0;           // >= 0, finite
  double beta1 = 0.9, beta2 = 0.999;  // [0, 1)
  double epsilon = 1e-8;              // > 0
  double weight_decay = 0.0;          // >= 0; decoupled
  bool decay_biases_and_norms = false;
  double max_grad_norm = 0.0;  // global L2 norm to clip to; 0: no clipping
  double loss_scale = 0.0;     // > 0: what the loss was multiplied by; 0: the stack's own
                               // (loss_scale()) where it is dynamic, else 1. Any other value
                               // than the stack's own leaves a dynamic scale as it is
  // LAMB alone.
  bool adapt_biases_and_norms = false;
  double min_trust_ratio = 0.0, max_trust_ratio = 0.0;  // 0 <= min <= max; max 0: no clamp above
};

struct ApplyResult {
  bool applied = false;          // false: a gradient was not finite, nothing was changed
  double grad_norm = 0.0;        // of the unscaled gradients, before clipping; may be inf or NaN
  int64_t step = 0;              // optimizer steps applied so far
  double loss_scale = 1.0;       // that this step divided by
  double next_loss_scale = 1.0;  // what to multiply the next loss by: changes only where dynamic
};

// Everything beyond the tensors that a checkpoint must hold to go on bit for bit.
struct StackCounters {
  int64_t optimizer_step = 0;
  uint64_t rng_counter = 0;  // training Forwards so far
  int64_t skipped_steps = 0;
  double loss_scale = 1.0;          // the current one where it is dynamic
  int64_t clean_steps = 0;          // since the scale last changed
  int64_t overflows_tolerated = 0;  // what is left of loss_scale_hysteresis
};

// Changes to a live stack; absent members stay.
struct StackChanges {
  std::optional<double> attn_dropout_ratio, hidden_dropout_ratio;
  std::optional<bool> training;
  std::optional<bool> normalize_invertible, gelu_checkpoint, attn_dropout_checkpoint,
      activation_checkpointing, stochastic_mode;
};

class Stack {
 public:
  // `config` is resolved. Allocates the whole plan: RESOURCE_EXHAUSTED with the plan's numbers and
  // what is free, before anything is allocated. Weights are normal(0, initializer_range) drawn from
  // (seed, parameter, element) alone, so the same on every backend.
  static absl::StatusOr<std::unique_ptr<Stack>> Create(Backend& backend, const StackConfig& config);
  virtual ~Stack() = default;

  virtual const StackConfig& config() const = 0;
  virtual const MemoryPlan& plan() const = 0;

  // Evaluation: no dropout, nothing kept.
  virtual absl::Status ForwardEval(const ForwardArgs& args) = 0;
  // Training: draws the next rng counter. RESOURCE_EXHAUSTED (with the numbers) when the context
  // arena is full; FAILED_PRECONDITION when training is off, or when normalize_invertible is on and
  // a norm's gamma is too small to divide by (names the layer, the norm, the channel). On failure
  // nothing has changed, the
  // rng counter included. The input and mask are copied into the context: the caller may reuse them
  // once the call's work is done.
  virtual absl::StatusOr<std::unique_ptr<Context>> ForwardTraining(const ForwardArgs& args) = 0;
  // Adds to the gradients of the context's layers. output_grad: act [B, S, H]; input_grad: act
  // [B, S, H] or absent; the two may not overlap. The context is spent afterwards: a second
  // Backward on it is FAILED_PRECONDITION. So is a Backward after weights of the context's layers
  // have changed since its Forward, with normalize_invertible or activation_checkpointing, which
  // compute from them what was not kept; the context stays as it is then. Without, it takes weights
  // as they are now.
  virtual absl::Status Backward(Context& context, const TensorView& output_grad,
                                const TensorView& input_grad) = 0;

  virtual absl::Status ZeroGradients() = 0;
  // Synchronises: the outcome decides what the next step's bias corrections are.
  virtual absl::StatusOr<ApplyResult> ApplyGradients(const OptimizerOptions& options) = 0;

  // All or none. The new plan is checked before anything changes: RESOURCE_EXHAUSTED with the
  // numbers. INVALID_ARGUMENT: a ratio outside [0, 1). FAILED_PRECONDITION: contexts are
  // outstanding and training goes off or a memory flag changes (their arena is laid out anew;
  // attn_dropout_checkpoint, which drops nothing, may change at any time). INTERNAL: the device
  // refused the new arena and then the old one too; training Forwards are refused until an Update
  // succeeds.
  virtual absl::Status Update(const StackChanges& changes) = 0;

  // Stored parameters in order, fused ones only: what a checkpoint holds.
  virtual const std::vector<ParameterInfo>& parameters() const = 0;
  // The separate Q, K, V names too. NOT_FOUND naming what exists.
  virtual absl::StatusOr<ParameterInfo> FindParameter(const std::string& name) const = 0;
  // Copies; synchronise. bytes must be exactly the part's size. dst and src are any memory of the
  // kind that `memory` says. FAILED_PRECONDITION for gradients and moments where training is off.
  virtual absl::Status ReadParameter(const std::string& name, ParameterPart part, void* dst,
                                     size_t bytes, Memory memory) = 0;
  virtual absl::Status WriteParameter(const std::string& name, ParameterPart part, const void* src,
                                      size_t bytes, Memory memory) = 0;
  // The same in host memory.
  absl::Status ReadParameter(const std::string& name, ParameterPart part, void* dst, size_t bytes) {
    return ReadParameter(name, part, dst, bytes, Memory::kHost);
  }
  absl::Status WriteParameter(const std::string& name, ParameterPart part, const void* src,
                              size_t bytes) {
    return WriteParameter(name, part, src, bytes, Memory::kHost);
  }
  // Bytes of a part: elements x (4 or the stack dtype's size).
  virtual absl::StatusOr<size_t> ParameterBytes(const std::string& name,
                                                ParameterPart part) const = 0;

  // What to multiply the loss by: 1 unless dynamic_loss_scale.
  virtual double loss_scale() const = 0;
  // Whether calls of these dims run the fused attention kernel (AttentionArgs), or the plain one.
  virtual bool FusedAttention(int64_t seq) const = 0;

  virtual StackCounters counters() const = 0;
  virtual void set_counters(const StackCounters& counters) = 0;

  // Bytes of the context arena in use and the most that ever was.
  virtual size_t context_bytes_in_use() const = 0;
  virtual size_t context_bytes_high_water() const = 0;

  // Device copies of a call's tensors, for backends whose kernels can't read host memory; each
  // holds the largest call. kInputAhead: what the next call's kInput is to be
  // (Backend::CopyInAhead). kOutputBehind: what the last call's kOutput was
  // (Backend::CopyOutBehind). FAILED_PRECONDITION on the others.
  enum class Staging : uint8_t {
    kInput,
    kOutput,
    kMask,
    kLengths,
    kCuSeqlens,
    kInputAhead,
    kOutputBehind
  };
  virtual absl::StatusOr<TensorView> StagingView(Staging slot, DType dtype, const Shape& shape) = 0;

  // Floating-point operations of a call, as users count them: forward per layer
  // 2T(4H^2 + 2HI) + 4H sum(S^2) over its sequences; backward twice that. Causal counts the same.
  static double ForwardFlops(const StackConfig& config, int64_t layers, int64_t tokens,
                             double sum_of_squared_lengths);
};

}  // namespace lamina
