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
class SessionCore;
}

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
  friend class Stack;
  std::string id_;
  std::string stack_;
  std::weak_ptr<internal::SessionCore> session_;
};

// Here and below '{}' lets a caller name some members alone without its compiler's complaint.
struct ForwardOptions {
  // Where the output [B, S, H] goes, in the stack's dtype; may not overlap the input. Absent: it
  // comes inside the answer, which the daemon's inline cap limits.
  Tensor output{};
  Tensor mask{};     // fp32 [B, 1, 1, S] or [B, S], added to the scores of each key
  Tensor lengths{};  // int32 [B], each 1..S; not together with mask
  std::optional<LayerRange> layers{};  // absent: all
  std::optional<bool> training{};      // absent: as the stack was configured
};

struct ForwardResult {
  Tensor output{};  // ForwardOptions::output, or one of this process's memory
  Context context;  // in training; none in evaluation
  StepTiming timing;
  Transport input_transport = Transport::kNone;
  Transport output_transport = Transport::kNone;
};

struct BackwardOptions {
  // Where the gradient by the Forward's input goes, [B, S, H] in the stack's dtype.
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

// One AdamW step with decoupled decay.
struct AdamW {
  double learning_rate = 0;  // >= 0 and finite
  double beta1 = 0.9;        // [0, 1)
  double beta2 = 0.999;      // [0, 1)
  double epsilon = 1e-8;     // > 0
  double weight_decay = 0;   // >= 0
  bool decay_biases_and_norms = false;
  double max_grad_norm = 0;     // clip the global L2 norm to this; 0: no clipping
  double loss_scale = 1;        // what the loss was multiplied by, > 0
  bool zero_gradients = false;  // zero the gradients afterwards, also when skipped
};

struct ApplyResult {
  bool applied = false;  // false: a gradient was not finite and nothing was changed
  double grad_norm = 0;  // L2 norm of the unscaled gradients before clipping
  int64_t step = 0;      // optimizer steps that the stack has applied
  StepTiming timing;
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
  // As it was when this handle was made; config, shapes and names do not change after that.
  const StackInfo& info() const { return *info_; }
  const StackConfig& config() const { return info_->config; }
  // As it is now.
  absl::StatusOr<StackInfo> Describe() const;

  // Runs layers over input [B, S, H] in the stack's dtype. In training it draws dropout masks and
  // keeps a context. RESOURCE_EXHAUSTED: no room for the context.
  absl::StatusOr<ForwardResult> Forward(const Tensor& input,
                                        const ForwardOptions& options = {}) const;
  // Adds to the gradients of the context's layers and spends the context; on an error both are as
  // they were. `output_grad` [B, S, H] in the stack's dtype.
  absl::StatusOr<BackwardResult> Backward(Context& context, const Tensor& output_grad,
                                          const BackwardOptions& options = {}) const;
  absl::StatusOr<ApplyResult> ApplyGradients(const AdamW& options) const;
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
