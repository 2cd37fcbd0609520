// A stack as one session drives it: forward, backward, optimizer, parameters, checkpoints.
//
// Errors are the daemon's own, with its message: INVALID_ARGUMENT names the field, the value and
// the range; NOT_FOUND a stack, context or parameter that is not there; RESOURCE_EXHAUSTED what was
// needed and what is free; FAILED_PRECONDITION a session that is over or training that is off;
// UNAVAILABLE a daemon that drains or cannot be reached.
//
// Threads: all methods from any thread; mutations of one session run one at a time (session.h).
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "lamina/client/tensor.h"
#include "lamina/client/types.h"

namespace lamina::client {

namespace internal {
struct Calls;
class SessionCore;
}  // namespace internal

// What one training Forward left on the daemon for its Backward. Move-only; a context that got no
// Backward is released by the destructor (one call; errors are ignored).
class Context {
 public:
  Context() = default;  // none: what an evaluation gives
  Context(Context&& other) noexcept;
  Context& operator=(Context&&) noexcept;
  ~Context();

  explicit operator bool() const { return !id_.empty(); }
  const std::string& id() const { return id_; }
  // Releases it now; nothing to do when it is spent. NOT_FOUND: the daemon no longer has it.
  absl::Status Release();

 private:
  friend struct internal::Calls;
  std::string id_;
  std::string stack_;
  std::weak_ptr<internal::SessionCore> session_;
};

// Here and below '{}' lets a caller name some members alone without its compiler's complaint.
struct ForwardOptions {
  // Where the output goes, shaped like the input, in the stack's dtype; may not overlap the input.
  // Absent: it comes inside the answer, which the daemon's inline cap limits.
  Tensor output{};
  Tensor mask{};     // fp32 [B, 1, 1, S] or [B, S], added to the scores of each key
  Tensor lengths{};  // int32 [B], each 1..S; not together with mask
  std::optional<LayerRange> layers{};  // absent: all
  std::optional<bool> training{};      // absent: as the stack was configured
  // A packed batch, without padding: int32 [n + 1], 0 first, T last; sequence i is tokens
  // [c[i], c[i + 1]), of 1..max_seq_length tokens. Input and output are [T, H] then, T at most
  // batch_size * max_seq_length; n may be above batch_size. Not together with mask or lengths.
  Tensor cumulative_lengths{};
};

struct ForwardResult {
  Tensor output{};  // ForwardOptions::output, or one of this process's memory
  Context context;  // in training; none in evaluation
  StepTiming timing;
  Transport input_transport = Transport::kNone;
  Transport output_transport = Transport::kNone;
  AttentionPath attention_path = AttentionPath::kNone;  // which attention kernel ran
};

struct BackwardOptions {
  // Where the gradient by the Forward's input goes, of its shape in the stack's dtype.
  Tensor input_grad{};
  // With no input_grad tensor: ask for the gradient inside the answer.
  bool want_input_grad = false;
};

struct BackwardResult {
  Tensor input_grad;  // absent where it was not wanted
  StepTiming timing;
  Transport input_transport = Transport::kNone;
  Transport output_transport = Transport::kNone;
};

// One optimizer step: AdamW with decoupled decay, or LAMB.
struct OptimizerOptions {
  double learning_rate = 0;  // >= 0 and finite
  double beta1 = 0.9;        // [0, 1)
  double beta2 = 0.999;      // [0, 1)
  double epsilon = 1e-8;     // > 0
  double weight_decay = 0;   // >= 0
  bool decay_biases_and_norms = false;
  double max_grad_norm = 0;     // clip the global L2 norm to this; 0: no clipping
  double loss_scale = 0;        // what the loss was multiplied by, > 0; 0: the stack's own where
                                // config().dynamic_loss_scale, else 1
  bool zero_gradients = false;  // zero the gradients afterwards, also when skipped
  OptimizerKind kind = OptimizerKind::kAdamW;
  // LAMB's alone.
  bool adapt_biases_and_norms = false;  // trust ratios for these too
  double min_trust_ratio = 0;           // ratios below are raised to this, >= 0
  double max_trust_ratio = 0;  // ratios above are lowered to this, >= min_trust_ratio; 0: no bound
};
using AdamW = OptimizerOptions;

struct ApplyResult {
  bool applied = false;  // false: a gradient was not finite and nothing was changed
  double grad_norm = 0;  // L2 norm of the unscaled gradients before clipping
  int64_t step = 0;      // optimizer steps that the stack has applied
  StepTiming timing;
  double loss_scale = 1;       // what the gradients were divided by
  double next_loss_scale = 1;  // what to multiply the next loss by
};

struct ParameterOptions {
  // fp32 for the master weights, or the stack's dtype for the weights. Gradients are fp32 always.
  DType dtype = DType::kFloat32;
  // A region's tensor of that dtype with exactly as many elements as all parameters together: the
  // values are written there, one after another, and the results are views of it. Absent: streamed
  // into memory of this process, in any size.
  Tensor target{};
};

class Stack {
 public:
  const std::string& name() const { return name_; }
  // As it was when this handle was made; of the config, UpdateStack can change dropout ratios,
  // training, memory flags and stochastic_mode after that.
  const StackInfo& info() const { return *info_; }
  const StackConfig& config() const { return info_->config; }
  // As it is now.
  absl::StatusOr<StackInfo> Describe() const;

  // Runs layers over input [B, S, H] in the stack's dtype, or a packed [T, H]. In training it draws
  // dropout masks and keeps a context. RESOURCE_EXHAUSTED: no room for the context.
  // FAILED_PRECONDITION: normalize_invertible with a gamma too small to divide by.
  absl::StatusOr<ForwardResult> Forward(const Tensor& input,
                                        const ForwardOptions& options = {}) const;
  // Adds to the gradients of the context's layers and spends the context; on an error both are as
  // they were. `output_grad` is shaped like the Forward's output, in the stack's dtype.
  absl::StatusOr<BackwardResult> Backward(Context& context, const Tensor& output_grad,
                                          const BackwardOptions& options = {}) const;
  absl::StatusOr<ApplyResult> ApplyGradients(const OptimizerOptions& options) const;
  absl::Status ZeroGradients() const;

  // `names` as "layers.<i>.<name>"; empty: all stored ones. The results are in that order.
  absl::StatusOr<std::vector<NamedTensor>> GetParameters(
      const std::vector<std::string>& names = {}, const ParameterOptions& options = {}) const;
  absl::StatusOr<std::vector<NamedTensor>> GetGradients(const std::vector<std::string>& names = {},
                                                        const ParameterOptions& options = {}) const;
  // Writes them, all or none; fp32 or the stack's dtype. Values above the inline cap that are not
  // in a region are moved through a temporary one where there are regions.
  absl::Status SetParameters(const std::vector<NamedTensor>& values) const;

  // `name` of the file without ending; empty: the stack's. See Client for the errors.
  absl::StatusOr<SavedCheckpoint> SaveCheckpoint(const std::string& name = "") const;
  absl::Status LoadCheckpoint(const std::string& name = "") const;

 private:
  friend class Session;
  friend struct internal::Calls;
  Stack(std::shared_ptr<internal::SessionCore> session, StackInfo info);
  absl::StatusOr<std::vector<NamedTensor>> Read(const std::vector<std::string>& names,
                                                const ParameterOptions& options,
                                                bool gradients) const;
  absl::StatusOr<std::vector<NamedTensor>> ReadIntoTarget(const std::vector<std::string>& names,
                                                          const ParameterOptions& options,
                                                          bool gradients) const;

  std::shared_ptr<internal::SessionCore> session_;
  std::string name_;
  std::shared_ptr<const StackInfo> info_;
};

}  // namespace lamina::client
