#include "lamina/transformer/stack.h"

#include <algorithm>
#include <bit>
#include <optional>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "arena.h"
#include "initializer.h"
#include "invertible_norms.h"
#include "layer.h"
#include "layout.h"
#include "loss_scale.h"
#include "optimizer.h"
#include "parameters.h"
#include "status_macros.h"

namespace lamina {
namespace {

// What a refusal for lack of memory says: "weights 123, gradients 456, ...".
std::string Breakdown(const MemoryPlan& plan) {
  std::string text;
  for (int kind = 0; kind < kMemoryKinds; ++kind) {
    const size_t bytes = plan.Bytes(static_cast<MemoryKind>(kind));
    if (bytes > 0)
      absl::StrAppend(&text, text.empty() ? "" : ", ", Name(static_cast<MemoryKind>(kind)), " ",
                      bytes);
  }
  return text;
}

bool Overlap(const TensorView& a, const TensorView& b) {
  if (!a || !b) return false;
  const auto* a0 = a.as<const char>();
  const auto* b0 = b.as<const char>();
  return std::less<>()(a0, b0 + b.bytes()) && std::less<>()(b0, a0 + a.bytes());
}

absl::Status CheckTensor(const char* call, const char* name, const TensorView& tensor, DType dtype,
                         const Shape& shape) {
  if (!tensor) return absl::InvalidArgumentError(absl::StrCat(call, ": ", name, " is absent"));
  if (tensor.dtype != dtype)
    return absl::InvalidArgumentError(
        absl::StrCat(call, ": ", name, " is ", Name(tensor.dtype), "; it must be ", Name(dtype)));
  if (tensor.shape != shape)
    return absl::InvalidArgumentError(absl::StrCat(call, ": ", name, " has shape ",
                                                   tensor.shape.ToString(), "; it must be ",
                                                   shape.ToString()));
  return absl::OkStatus();
}

// [B, S, H] or, packed, [T, H] as [T, H].
TensorView Tokens(const TensorView& activation) {
  const Shape& s = activation.shape;
  return s.rank() == 2 ? activation : activation.Reshaped({s[0] * s[1], s[2]});
}

// What a step does. Part of its key.
enum class StepKind : uint64_t { kEvaluation, kForward, kBackward };

// What steps have in common that differ in nothing but sizes and addresses.
StepCache::Key KindOf(StepKind kind, LayerRange layers, const LayerCall& call) {
  return {static_cast<uint64_t>(kind), static_cast<uint64_t>(layers.begin),
          static_cast<uint64_t>(layers.end), call.cu_seqlens.data != nullptr ? 1u : 0u};
}

// All that decides a step's launches but the stack's own buffers and the flags that lay them out,
// whose change forgets every step. A context's buffers follow from where it begins, which is where
// its RngState lies.
StepCache::Key StepKey(StepKind kind, LayerRange layers, const LayerCall& call,
                       const TensorView& from, const TensorView& to) {
  const auto address = [](const void* data) { return reinterpret_cast<uintptr_t>(data); };
  return {static_cast<uint64_t>(kind),
          static_cast<uint64_t>(layers.begin),
          static_cast<uint64_t>(layers.end),
          static_cast<uint64_t>(call.dims.batch),
          static_cast<uint64_t>(call.dims.seq),
          static_cast<uint64_t>(call.dims.packed_tokens),
          std::bit_cast<uint32_t>(call.attn_dropout),
          std::bit_cast<uint32_t>(call.hidden_dropout),
          call.workspace.unordered ? 1u : 0u,
          address(call.rng),
          address(call.mask.data),
          address(call.lengths.data),
          address(call.cu_seqlens.data),
          address(from.data),
          address(to.data)};
}

class StackImpl;

class StackContext final : public Context {
 public:
  ~StackContext() override { ranges->Give(offset, size); }
  LayerRange layers() const override { return range; }
  int64_t batch() const override { return call.dims.batch; }
  int64_t seq() const override { return call.dims.seq; }
  size_t bytes() const override { return size; }
  int64_t tokens() const override { return call.dims.tokens(); }
  bool packed() const override { return call.dims.packed_tokens > 0; }
  Shape activation_shape() const override {
    return packed() ? Shape{tokens(), call.dims.hidden}
                    : Shape{call.dims.batch, call.dims.seq, call.dims.hidden};
  }

  const StackImpl* owner = nullptr;
  RangeAllocator* ranges = nullptr;
  size_t offset = 0, size = 0;
  LayerRange range;
  LayerCall call;  // the dropout ratios of Forward included: Backward must use the same
  RngState rng{};  // host copy; the enqueued copy reads it
  ContextBuffers buffers;
  std::vector<int64_t> weights_versions;  // of its layers, at Forward
  bool spent = false;
};

class StackImpl final : public Stack {
 public:
  StackImpl(Backend& backend, const StackConfig& config)
      : backend_(backend),
        config_(config),
        parameters_(config),
        weights_versions_(config.num_hidden_layers),
        invertible_norms_(config_, parameters_),
        optimizer_step_(backend, parameters_),
        steps_(backend.MakeStepCache()) {}

  absl::Status Init();

  const StackConfig& config() const override { return config_; }
  const MemoryPlan& plan() const override { return plan_; }

  absl::Status ForwardEval(const ForwardArgs& args) override;
  absl::StatusOr<std::unique_ptr<Context>> ForwardTraining(const ForwardArgs& args) override;
  absl::Status Backward(Context& context, const TensorView& output_grad,
                        const TensorView& input_grad) override;

  absl::Status ZeroGradients() override;
  absl::StatusOr<ApplyResult> ApplyGradients(const OptimizerOptions& options) override;

  absl::Status Update(const StackChanges& changes) override;

  const std::vector<ParameterInfo>& parameters() const override { return parameters_.parameters(); }
  absl::StatusOr<ParameterInfo> FindParameter(const std::string& name) const override;
  absl::Status ReadParameter(const std::string& name, ParameterPart part, void* dst, size_t bytes,
                             Memory memory) override;
  absl::Status WriteParameter(const std::string& name, ParameterPart part, const void* src,
                              size_t bytes, Memory memory) override;
  absl::StatusOr<size_t> ParameterBytes(const std::string& name, ParameterPart part) const override;

  double loss_scale() const override {
    return config_.dynamic_loss_scale ? counters_.loss_scale : 1.0;
  }
  bool FusedAttention(int64_t seq) const override {
    return backend_.sizes().FusedAttention(config_.Dims(1, seq));
  }

  StackCounters counters() const override { return counters_; }
  void set_counters(const StackCounters& counters) override { counters_ = counters; }

  size_t context_bytes_in_use() const override { return context_ranges_.in_use(); }
  size_t context_bytes_high_water() const override { return context_ranges_.high_water(); }

  absl::StatusOr<TensorView> StagingView(Staging slot, DType dtype, const Shape& shape) override;

 private:
  absl::Status CheckForward(const char* call, const ForwardArgs& args) const;
  absl::Status CheckDense(const char* call, const ForwardArgs& args) const;
  absl::Status CheckPacked(const char* call, const ForwardArgs& args) const;
  LayerDims DimsOf(const ForwardArgs& args) const;
  absl::Status CheckFits(const MemoryPlan& plan, size_t bytes) const;
  LayerCall CallFor(const ForwardArgs& args) const;
  // The part of the flat buffer in which `slot` lies; FAILED_PRECONDITION where it isn't kept.
  absl::StatusOr<TensorView> PartView(const ParameterLayout::Slot& slot, ParameterPart part) const;
  absl::Status CheckInvertible(LayerRange layers);
  // What of the weights Backward reads must be as Forward read it.
  absl::Status CheckWeightsOf(const StackContext& context) const;
  absl::Status AllocateTraining();
  // Of the arena that holds the shared recomputed activations and the contexts.
  size_t ActivationBytes(const StackConfig& config) const;
  absl::Status ReplaceActivations(const StackConfig& wanted);
  LayerActivations Recomputed(const LayerDims& dims) const;
  const Layer& LayerAt(int64_t index) const { return layers_[static_cast<size_t>(index)]; }
  // Null outside of `layers`.
  const Layer* LayerIn(LayerRange layers, int64_t index) const {
    return index >= layers.begin && index < layers.end ? &LayerAt(index) : nullptr;
  }
  absl::Status CopyNormVectors();
  void WeightsChanged(LayerRange layers);
  void MakeLayers();
  absl::Status InitializeWeights();
  absl::Status NeedTraining(const char* call) const;

  Backend& backend_;
  StackConfig config_;
  MemoryPlan plan_;
  ParameterLayout parameters_;
  StackCounters counters_;
  std::vector<int64_t> weights_versions_;  // by layer: counts what changed its weights
  InvertibleNorms invertible_norms_;
  OptimizerStep optimizer_step_;

  DeviceArena weights_arena_, workspace_arena_, training_arena_, activations_arena_;
  WeightBuffers weights_;
  WorkspaceBuffers workspace_;
  TrainingBuffers training_;
  size_t contexts_begin_ = 0;  // in the activations' arena, behind what is recomputed
  RangeAllocator context_ranges_;
  std::vector<Layer> layers_;
  std::unique_ptr<StepCache> steps_;  // gone before the buffers that its steps use
};

// --- memory ---

absl::Status StackImpl::CheckFits(const MemoryPlan& plan, size_t bytes) const {
  LAMINA_ASSIGN_OR_RETURN(const size_t free_bytes, backend_.FreeBytes());
  if (bytes <= free_bytes) return absl::OkStatus();
  return absl::ResourceExhaustedError(
      absl::StrCat("the stack needs ", bytes, " more bytes on ", backend_.info().kind, ":",
                   backend_.info().ordinal, " and ", free_bytes, " are free; its plan is ",
                   plan.Total(), " bytes: ", Breakdown(plan)));
}

absl::Status StackImpl::Init() {
  LAMINA_ASSIGN_OR_RETURN(plan_, PlanStack(config_, backend_.sizes()));
  LAMINA_RETURN_IF_ERROR(CheckFits(plan_, plan_.Total()));

  Placer weights_size(nullptr);
  PlaceWeights(weights_size, config_, parameters_);
  LAMINA_ASSIGN_OR_RETURN(weights_arena_, DeviceArena::Allocate(backend_, weights_size.bytes()));
  Placer weights(weights_arena_.data());
  weights_ = PlaceWeights(weights, config_, parameters_);

  Placer workspace_size(nullptr);
  PlaceWorkspace(workspace_size, config_, backend_.sizes());
  LAMINA_ASSIGN_OR_RETURN(workspace_arena_,
                          DeviceArena::Allocate(backend_, workspace_size.bytes()));
  Placer workspace(workspace_arena_.data());
  workspace_ = PlaceWorkspace(workspace, config_, backend_.sizes());

  if (config_.training) LAMINA_RETURN_IF_ERROR(AllocateTraining());
  MakeLayers();
  LAMINA_RETURN_IF_ERROR(InitializeWeights());
  StartLossScale(config_, counters_);
  return backend_.Synchronize();
}

size_t StackImpl::ActivationBytes(const StackConfig& config) const {
  Placer recompute(nullptr), context(nullptr);
  PlaceLargestRecompute(recompute, config, backend_.sizes());
  PlaceLargestContext(context, config, backend_.sizes());
  return recompute.bytes() + context.bytes() * static_cast<size_t>(config.max_contexts);
}

// Changes nothing where it fails.
absl::Status StackImpl::AllocateTraining() {
  Placer size(nullptr);
  PlaceTraining(size, config_, parameters_);
  LAMINA_ASSIGN_OR_RETURN(DeviceArena training, DeviceArena::Allocate(backend_, size.bytes()));
  Placer placer(training.data());
  const TrainingBuffers buffers = PlaceTraining(placer, config_, parameters_);
  for (const TensorView& t : {buffers.gradients, buffers.m, buffers.v})
    LAMINA_RETURN_IF_ERROR(backend_.SetZero(t.data, t.bytes()));
  LAMINA_RETURN_IF_ERROR(ReplaceActivations(config_));

  training_arena_ = std::move(training);
  training_ = buffers;
  optimizer_step_.ForgetBuffers();
  return absl::OkStatus();
}

// An arena for what `wanted` keeps, instead of the present one. Where it fails the present one
// stays.
absl::Status StackImpl::ReplaceActivations(const StackConfig& wanted) {
  const size_t bytes = ActivationBytes(wanted), old_bytes = activations_arena_.bytes();
  absl::StatusOr<DeviceArena> arena = DeviceArena::Allocate(backend_, bytes);
  if (!arena.ok() && old_bytes > 0) {
    // Not both at once, then: what it holds is worth nothing without contexts.
    activations_arena_.Reset();
    arena = DeviceArena::Allocate(backend_, bytes);
    if (!arena.ok()) {
      absl::StatusOr<DeviceArena> old = DeviceArena::Allocate(backend_, old_bytes);
      if (!old.ok()) {
        contexts_begin_ = 0;
        context_ranges_ = RangeAllocator();
        return absl::InternalError(absl::StrCat(
            "Update: neither the new activations, ", bytes, " bytes, nor the old ones, ", old_bytes,
            " bytes, could be allocated; training Forwards are refused until an Update succeeds: ",
            arena.status().message()));
      }
      activations_arena_ = *std::move(old);
    }
  }
  if (!arena.ok()) return arena.status();
  activations_arena_ = *std::move(arena);
  Placer recompute(nullptr);
  PlaceLargestRecompute(recompute, wanted, backend_.sizes());
  contexts_begin_ = recompute.bytes();
  context_ranges_ = RangeAllocator(bytes - contexts_begin_);
  return absl::OkStatus();
}

void StackImpl::MakeLayers() {
  layers_.clear();
  for (int64_t i = 0; i < config_.num_hidden_layers; ++i)
    layers_.emplace_back(
        backend_, i, parameters_.LayerViews(i, weights_.weights.data, config_.dtype),
        training_.gradients ? parameters_.LayerViews(i, training_.gradients.data, DType::kF32)
                            : LayerTensors{});
}

absl::Status StackImpl::InitializeWeights() {
  // Zeros first: the padding between parameters keeps them.
  LAMINA_RETURN_IF_ERROR(backend_.SetZero(weights_.master.data, weights_.master.bytes()));
  const auto count = static_cast<int64_t>(parameters_.parameters().size());
  std::vector<float> host;
  for (int64_t id = 0; id < count; ++id) {
    const int kind = static_cast<int>(id % kParametersPerLayer);
    const int64_t elements = parameters_.ShapeOf(kind).elements();
    float* device =
        weights_.master.as<float>() + parameters_.Offset(id / kParametersPerLayer, kind);
    if (backend_.info().host_memory) {
      LAMINA_RETURN_IF_ERROR(backend_.Synchronize());
      FillInitial(config_, parameters_, id, device);
      continue;
    }
    host.resize(
        static_cast<size_t>(std::max<int64_t>(elements, static_cast<int64_t>(host.size()))));
    FillInitial(config_, parameters_, id, host.data());
    LAMINA_RETURN_IF_ERROR(
        backend_.CopyIn(device, host.data(), static_cast<size_t>(elements) * sizeof(float)));
    LAMINA_RETURN_IF_ERROR(backend_.Synchronize());  // host is filled again next
  }
  if (config_.dtype == DType::kF32) return absl::OkStatus();
  return backend_.Cast(workspace_.ops, {.src = weights_.master, .dst = weights_.weights});
}

absl::Status StackImpl::Update(const StackChanges& changes) {
  StackConfig wanted = config_;
  if (changes.attn_dropout_ratio.has_value()) {
    LAMINA_RETURN_IF_ERROR(CheckDropoutRatio("attn_dropout_ratio", *changes.attn_dropout_ratio));
    wanted.attn_dropout_ratio = *changes.attn_dropout_ratio;
  }
  if (changes.hidden_dropout_ratio.has_value()) {
    LAMINA_RETURN_IF_ERROR(
        CheckDropoutRatio("hidden_dropout_ratio", *changes.hidden_dropout_ratio));
    wanted.hidden_dropout_ratio = *changes.hidden_dropout_ratio;
  }
  wanted.attn_dropout_checkpoint =
      changes.attn_dropout_checkpoint.value_or(config_.attn_dropout_checkpoint);
  wanted.stochastic_mode = changes.stochastic_mode.value_or(config_.stochastic_mode);

  // The others decide what is allocated, and how it is laid out.
  std::string relaid;
  const auto change = [&](const char* name, bool StackConfig::*member,
                          const std::optional<bool>& value) {
    wanted.*member = value.value_or(config_.*member);
    if (wanted.*member != config_.*member)
      absl::StrAppend(&relaid, relaid.empty() ? "" : ", ", name, " = ",
                      wanted.*member ? "true" : "false");
  };
  change("training", &StackConfig::training, changes.training);
  change("normalize_invertible", &StackConfig::normalize_invertible, changes.normalize_invertible);
  change("gelu_checkpoint", &StackConfig::gelu_checkpoint, changes.gelu_checkpoint);
  change("activation_checkpointing", &StackConfig::activation_checkpointing,
         changes.activation_checkpointing);
  // An Update that failed may have lost the activations.
  const bool lost = config_.training && activations_arena_.bytes() == 0;
  if (relaid.empty() && !lost) {
    config_ = wanted;
    return absl::OkStatus();
  }
  if (context_ranges_.taken() > 0)
    return absl::FailedPreconditionError(absl::StrCat(
        "Update: ", context_ranges_.taken(), " activation contexts are outstanding, whose memory ",
        relaid, " would lay out anew; release them first"));
  LAMINA_ASSIGN_OR_RETURN(MemoryPlan plan, PlanStack(wanted, backend_.sizes()));
  const size_t held = plan_.Total();
  if (plan.Total() > held) LAMINA_RETURN_IF_ERROR(CheckFits(plan, plan.Total() - held));
  // Enqueued work may still use what is freed here.
  LAMINA_RETURN_IF_ERROR(backend_.Synchronize());
  steps_->Forget();
  const StackConfig before = config_;
  if (wanted.training && !before.training) {
    config_ = wanted;  // what AllocateTraining goes by
    const absl::Status allocated = AllocateTraining();
    if (!allocated.ok()) {
      config_ = before;
      return allocated;
    }
  } else if (wanted.training) {
    LAMINA_RETURN_IF_ERROR(ReplaceActivations(wanted));
  } else if (before.training) {
    training_ = TrainingBuffers{};
    training_arena_.Reset();
    activations_arena_.Reset();
    contexts_begin_ = 0;
    context_ranges_ = RangeAllocator();
    counters_.optimizer_step = 0;  // the moments are gone, so their bias corrections start over
  }
  config_ = wanted;
  plan_ = std::move(plan);
  MakeLayers();
  return absl::OkStatus();
}

absl::Status StackImpl::NeedTraining(const char* call) const {
  if (config_.training) return absl::OkStatus();
  return absl::FailedPreconditionError(
      absl::StrCat(call, ": training is off for this stack; turn it on first"));
}

// --- steps ---

absl::Status StackImpl::CheckForward(const char* call, const ForwardArgs& args) const {
  if (args.layers.begin < 0 || args.layers.begin >= args.layers.end ||
      args.layers.end > config_.num_hidden_layers)
    return absl::InvalidArgumentError(absl::StrCat(
        call, ": layers are [", args.layers.begin, ", ", args.layers.end,
        "); they must be a range in [0, ", config_.num_hidden_layers, ") with one layer at least"));
  if (!args.input) return absl::InvalidArgumentError(absl::StrCat(call, ": input is absent"));
  const bool packed = static_cast<bool>(args.cu_seqlens);
  LAMINA_RETURN_IF_ERROR(packed ? CheckPacked(call, args) : CheckDense(call, args));
  LAMINA_RETURN_IF_ERROR(CheckTensor(call, "input", args.input, config_.dtype, args.input.shape));
  LAMINA_RETURN_IF_ERROR(CheckTensor(call, "output", args.output, config_.dtype, args.input.shape));
  for (const auto& [name, tensor] :
       {std::pair("input", args.input), std::pair("mask", args.mask),
        std::pair("lengths", args.lengths), std::pair("cu_seqlens", args.cu_seqlens)})
    if (Overlap(tensor, args.output))
      return absl::InvalidArgumentError(absl::StrCat(call, ": output overlaps ", name));
  const LayerDims dims = DimsOf(args);
  if (backend_.WorkspaceBytes(dims) > workspace_.ops.bytes)
    return absl::InternalError(absl::StrCat(call, ": the backend wants ",
                                            backend_.WorkspaceBytes(dims), " workspace bytes for ",
                                            args.input.shape.ToString(), ", more than the ",
                                            workspace_.ops.bytes, " for the largest call"));
  return absl::OkStatus();
}

absl::Status StackImpl::CheckDense(const char* call, const ForwardArgs& args) const {
  const Shape& shape = args.input.shape;
  if (shape.rank() != 3 || shape[0] < 1 || shape[0] > config_.batch_size || shape[1] < 1 ||
      shape[1] > config_.max_seq_length || shape[2] != config_.hidden_size)
    return absl::InvalidArgumentError(absl::StrCat(
        call, ": input has shape ", shape.ToString(), "; it must be [B, S, ", config_.hidden_size,
        "] with B in [1, ", config_.batch_size, "] (batch_size) and S in [1, ",
        config_.max_seq_length, "] (max_seq_length), or packed, with cu_seqlens"));
  if (args.mask && args.lengths)
    return absl::InvalidArgumentError(
        absl::StrCat(call, ": both mask and lengths are present; give one of the two"));
  if (args.mask)
    LAMINA_RETURN_IF_ERROR(CheckTensor(call, "mask", args.mask, DType::kF32, {shape[0], shape[1]}));
  if (args.lengths)
    LAMINA_RETURN_IF_ERROR(CheckTensor(call, "lengths", args.lengths, DType::kI32, {shape[0]}));
  return absl::OkStatus();
}

absl::Status StackImpl::CheckPacked(const char* call, const ForwardArgs& args) const {
  const Shape& shape = args.input.shape;
  const int64_t most = config_.batch_size * config_.max_seq_length;
  if (shape.rank() != 2 || shape[0] < 1 || shape[0] > most || shape[1] != config_.hidden_size)
    return absl::InvalidArgumentError(absl::StrCat(
        call, ": packed input has shape ", shape.ToString(), "; it must be [T, ",
        config_.hidden_size, "] with T in [1, ", most, "] (batch_size * max_seq_length)"));
  for (const auto& [name, tensor] :
       {std::pair("mask", args.mask), std::pair("lengths", args.lengths)})
    if (tensor)
      return absl::InvalidArgumentError(absl::StrCat(
          call, ": ", name, " is present with cu_seqlens; a packed batch has no padding to mask"));
  const Shape& offsets = args.cu_seqlens.shape;
  if (offsets.rank() != 1 || offsets[0] < 2 || offsets[0] > shape[0] + 1)
    return absl::InvalidArgumentError(absl::StrCat(
        call, ": cu_seqlens has shape ", offsets.ToString(),
        "; it must be [n + 1] for n sequences, n in [1, ", shape[0], "], the number of tokens"));
  LAMINA_RETURN_IF_ERROR(CheckTensor(call, "cu_seqlens", args.cu_seqlens, DType::kI32, offsets));
  // n sequences of T tokens: the longest has T/n tokens at least, and leaves one to each other.
  const int64_t sequences = offsets[0] - 1;
  const int64_t least = (shape[0] + sequences - 1) / sequences;
  const int64_t longest = std::min(config_.max_seq_length, shape[0] - sequences + 1);
  if (args.longest < least || args.longest > longest)
    return absl::InvalidArgumentError(
        absl::StrCat(call, ": longest is ", args.longest, "; of ", sequences, " sequences with ",
                     shape[0], " tokens the longest has a length in [", least, ", ", longest,
                     "] (max_seq_length is ", config_.max_seq_length, ")"));
  return absl::OkStatus();
}

LayerDims StackImpl::DimsOf(const ForwardArgs& args) const {
  return args.cu_seqlens
             ? config_.Dims(args.cu_seqlens.shape[0] - 1, args.longest, args.input.shape[0])
             : config_.Dims(args.input.shape[0], args.input.shape[1]);
}

LayerCall StackImpl::CallFor(const ForwardArgs& args) const {
  return LayerCall{.dims = DimsOf(args),
                   .pre_layer_norm = config_.pre_layer_norm,
                   .gelu = config_.gelu,
                   .eps = static_cast<float>(config_.layer_norm_eps),
                   .causal = config_.causal,
                   .mask = args.mask,
                   .lengths = args.lengths,
                   .cu_seqlens = args.cu_seqlens,
                   .workspace = workspace_.ops,
                   .pending = workspace_.pending};
}

absl::Status StackImpl::ForwardEval(const ForwardArgs& args) {
  LAMINA_RETURN_IF_ERROR(CheckForward("Forward", args));
  const LayerCall call = CallFor(args);
  const LayerActivations activations =
      ScratchActivations(call.dims, CutScratch(workspace_.scratch, call.dims));
  // Outputs alternate between the chain buffer and the caller's, so that the last is the caller's.
  const TensorView output = Tokens(args.output);
  const TensorView chain = workspace_.chain.Reshaped(output.shape);
  const auto output_of = [&](int64_t i) {
    return (args.layers.end - 1 - i) % 2 == 0 ? output : chain;
  };
  const auto run = [&](int64_t part) {
    const int64_t i = args.layers.begin + part;
    const ProfilerRange range(backend_, "layer.forward", i);
    return LayerAt(i).Forward(call, part == 0 ? Tokens(args.input) : output_of(i - 1), activations,
                              output_of(i), LayerIn(args.layers, i - 1),
                              LayerIn(args.layers, i + 1), activations);
  };
  return steps_->Run(KindOf(StepKind::kEvaluation, args.layers, call),
                     StepKey(StepKind::kEvaluation, args.layers, call, args.input, args.output),
                     args.layers.end - args.layers.begin, run);
}

absl::StatusOr<std::unique_ptr<Context>> StackImpl::ForwardTraining(const ForwardArgs& args) {
  LAMINA_RETURN_IF_ERROR(NeedTraining("Forward"));
  LAMINA_RETURN_IF_ERROR(CheckForward("Forward", args));
  LAMINA_RETURN_IF_ERROR(CheckInvertible(args.layers));
  const LayerDims dims = DimsOf(args);
  const int64_t layers = args.layers.end - args.layers.begin;
  const size_t attn_saved_bytes = backend_.AttentionSavedBytes(dims);
  const size_t bytes = ContextBytes(config_, backend_.sizes(), layers, dims);
  const absl::StatusOr<size_t> offset = context_ranges_.Take(bytes);
  if (!offset.ok())
    return absl::ResourceExhaustedError(
        absl::StrCat("Forward: no room for the activation context of ", layers, " layers at ",
                     args.input.shape.ToString(), ": ", offset.status().message(),
                     "; release a context, or create the stack with larger max_contexts"));
  auto context = std::make_unique<StackContext>();
  StackContext& c = *context;
  c.owner = this;
  c.ranges = &context_ranges_;
  c.offset = *offset;
  c.size = bytes;
  c.range = args.layers;
  c.weights_versions.assign(weights_versions_.begin() + args.layers.begin,
                            weights_versions_.begin() + args.layers.end);
  Placer placer(static_cast<char*>(activations_arena_.data()) + contexts_begin_ + c.offset);
  c.buffers = PlaceContext(placer, config_, layers, dims, attn_saved_bytes);

  c.call = CallFor(args);
  c.call.attn_dropout = static_cast<float>(config_.attn_dropout_ratio);
  c.call.hidden_dropout = static_cast<float>(config_.hidden_dropout_ratio);
  c.call.rng = c.buffers.rng;
  for (TensorView LayerCall::*keys :
       {&LayerCall::mask, &LayerCall::lengths, &LayerCall::cu_seqlens})
    if (c.call.*keys) (c.call.*keys).data = c.buffers.keys;
  c.rng = RngState{static_cast<uint64_t>(config_.seed), counters_.rng_counter};
  LAMINA_RETURN_IF_ERROR(backend_.CopyIn(c.buffers.rng, &c.rng, sizeof(c.rng)));
  for (const TensorView& keys : {args.mask, args.lengths, args.cu_seqlens})
    if (keys) LAMINA_RETURN_IF_ERROR(backend_.CopyWithin(c.buffers.keys, keys.data, keys.bytes()));
  if (c.buffers.input)
    LAMINA_RETURN_IF_ERROR(
        backend_.CopyWithin(c.buffers.input.data, args.input.data, args.input.bytes()));

  const LayerScratch scratch = CutScratch(workspace_.scratch, dims);
  const TensorView output = Tokens(args.output);
  const TensorView chain = workspace_.chain.Reshaped(output.shape);
  const TensorView input = c.buffers.input ? c.buffers.input : Tokens(args.input);
  const auto activations = [&](int64_t i) {
    return WithScratch(config_.activation_checkpointing
                           ? Recomputed(dims)
                           : c.buffers.layers[static_cast<size_t>(i)].activations,
                       dims, scratch);
  };
  // Where outputs are not kept they alternate, so that the last is the caller's.
  const auto output_of = [&](int64_t i) {
    const TensorView& saved = c.buffers.layers[static_cast<size_t>(i)].output;
    if (saved && i + 1 < layers) return saved;
    return (layers - 1 - i) % 2 == 0 ? output : chain;
  };
  const auto run = [&](int64_t i) -> absl::Status {
    const int64_t index = args.layers.begin + i;
    const ProfilerRange range(backend_, "layer.forward", index);
    const bool last = i + 1 == layers;
    const TensorView y = output_of(i);
    LAMINA_RETURN_IF_ERROR(
        LayerAt(index).Forward(c.call, i == 0 ? input : output_of(i - 1), activations(i), y,
                               LayerIn(args.layers, index - 1), LayerIn(args.layers, index + 1),
                               last ? LayerActivations{} : activations(i + 1)));
    const TensorView& saved = c.buffers.layers[static_cast<size_t>(i)].output;
    return saved && last ? backend_.CopyWithin(saved.data, y.data, y.bytes()) : absl::OkStatus();
  };
  LAMINA_RETURN_IF_ERROR(
      steps_->Run(KindOf(StepKind::kForward, args.layers, c.call),
                  StepKey(StepKind::kForward, args.layers, c.call, input, output), layers, run));
  ++counters_.rng_counter;
  return context;
}

LayerActivations StackImpl::Recomputed(const LayerDims& dims) const {
  Placer placer(activations_arena_.data());
  return PlaceActivations(placer, MemoryKind::kWorkspace, "recompute", config_, dims,
                          backend_.AttentionSavedBytes(dims));
}

absl::Status StackImpl::CheckWeightsOf(const StackContext& context) const {
  if (std::equal(context.weights_versions.begin(), context.weights_versions.end(),
                 weights_versions_.begin() + context.range.begin) ||
      !(config_.normalize_invertible || config_.activation_checkpointing))
    return absl::OkStatus();
  return absl::FailedPreconditionError(absl::StrCat(
      "Backward: weights of its layers have changed since this context's Forward, and with ",
      config_.activation_checkpointing ? "activation_checkpointing" : "normalize_invertible",
      " what was not kept is computed again from them; release the context and run Forward again"));
}

absl::Status StackImpl::Backward(Context& context, const TensorView& output_grad,
                                 const TensorView& input_grad) {
  LAMINA_RETURN_IF_ERROR(NeedTraining("Backward"));
  auto* c = dynamic_cast<StackContext*>(&context);
  if (c == nullptr || c->owner != this)
    return absl::InvalidArgumentError("Backward: the context belongs to another stack");
  if (c->spent)
    return absl::FailedPreconditionError(
        "Backward: the context is spent; each training Forward allows one Backward");
  const Shape shape = c->activation_shape();
  LAMINA_RETURN_IF_ERROR(CheckTensor("Backward", "output_grad", output_grad, config_.dtype, shape));
  if (input_grad)
    LAMINA_RETURN_IF_ERROR(CheckTensor("Backward", "input_grad", input_grad, config_.dtype, shape));
  if (Overlap(output_grad, input_grad))
    return absl::InvalidArgumentError("Backward: input_grad overlaps output_grad");
  LAMINA_RETURN_IF_ERROR(CheckWeightsOf(*c));

  c->spent = true;  // from here on gradients change
  const LayerDims& dims = c->call.dims;
  const LayerScratch scratch = CutScratch(workspace_.scratch, dims);
  // Recomputation is Forward again, to the bit: it has no part in stochastic_mode.
  LayerCall backward_call = c->call;
  backward_call.workspace.unordered = config_.stochastic_mode;
  const auto layers = static_cast<int64_t>(c->buffers.layers.size());
  const auto input_of = [&](int64_t i) {
    return i == 0 ? c->buffers.input : c->buffers.layers[static_cast<size_t>(i - 1)].output;
  };
  // Gradients of inputs alternate, too.
  const auto input_grad_of = [&](int64_t i) {
    if (i == 0 && input_grad) return Tokens(input_grad);
    return ((layers - 1 - i) % 2 == 0 ? workspace_.chain : training_.chain)
        .Reshaped(Tokens(output_grad).shape);
  };
  const auto run = [&](int64_t part) -> absl::Status {
    const int64_t i = layers - 1 - part;
    const int64_t index = c->range.begin + i;
    const ProfilerRange range(backend_, "layer.backward", index);
    const ContextBuffers::SavedLayer& saved = c->buffers.layers[static_cast<size_t>(i)];
    const TensorView x = input_of(i);
    const Layer& layer = LayerAt(index);
    LayerActivations activations = saved.activations;
    activations.y = saved.output;
    if (config_.activation_checkpointing) {
      activations = Recomputed(dims);
      // Pre-LN needs y no more. Post-LN's is read, if at all, before anything is written to the
      // branch's scratch; where it is not, the residual of its sum lies there.
      if (!config_.pre_layer_norm)
        activations.y = config_.inverts_norms() ? scratch.branch : scratch.product;
      LAMINA_RETURN_IF_ERROR(layer.Forward(c->call, x, WithScratch(activations, dims, scratch),
                                           activations.y, nullptr, nullptr, {}));
    }
    const bool first = part == 0;
    const bool takes_norm = !first && (config_.pre_layer_norm || !input_of(i + 1));
    return layer.Backward(
        backward_call, x, activations, first ? Tokens(output_grad) : input_grad_of(i + 1), scratch,
        input_grad_of(i), takes_norm ? &LayerAt(index + 1) : nullptr, LayerIn(c->range, index - 1));
  };
  return steps_->Run(KindOf(StepKind::kBackward, c->range, backward_call),
                     StepKey(StepKind::kBackward, c->range, backward_call, output_grad, input_grad),
                     layers, run);
}

absl::Status StackImpl::ZeroGradients() {
  LAMINA_RETURN_IF_ERROR(NeedTraining("ZeroGradients"));
  return backend_.SetZero(training_.gradients.data, training_.gradients.bytes());
}

absl::StatusOr<ApplyResult> StackImpl::ApplyGradients(const OptimizerOptions& options) {
  LAMINA_RETURN_IF_ERROR(NeedTraining("ApplyGradients"));
  OptimizerOptions effective = options;
  if (options.loss_scale == 0.0) effective.loss_scale = loss_scale();
  LAMINA_RETURN_IF_ERROR(CheckOptions(effective));
  const OptimizerBuffers buffers{.weights = weights_.weights,
                                 .master = weights_.master,
                                 .gradients = training_.gradients,
                                 .m = training_.m,
                                 .v = training_.v,
                                 .control = training_.control,
                                 .segments = training_.segments};
  WeightsChanged({0, config_.num_hidden_layers});  // or half of them, where a call fails
  LAMINA_RETURN_IF_ERROR(
      optimizer_step_.Enqueue(workspace_.ops, buffers, effective, counters_.optimizer_step + 1));
  OptimizerControl control{};
  LAMINA_RETURN_IF_ERROR(backend_.CopyOut(&control, training_.control, sizeof(control)));
  // With the synchronisation that there is anyway, so that no Forward needs one of its own.
  if (config_.inverts_norms()) LAMINA_RETURN_IF_ERROR(CopyNormVectors());
  LAMINA_RETURN_IF_ERROR(backend_.Synchronize());
  if (config_.inverts_norms()) invertible_norms_.Judge();

  const bool applied = control.skip == 0;
  ++(applied ? counters_.optimizer_step : counters_.skipped_steps);
  // A step that divided by another scale says nothing about this one.
  if (config_.dynamic_loss_scale && effective.loss_scale == counters_.loss_scale)
    AdjustLossScale(config_, /*overflow=*/!applied, counters_);
  return ApplyResult{
      .applied = applied,
      .grad_norm = control.grad_norm,
      .step = counters_.optimizer_step,
      .loss_scale = effective.loss_scale,
      .next_loss_scale = config_.dynamic_loss_scale ? loss_scale() : effective.loss_scale};
}

void StackImpl::WeightsChanged(LayerRange layers) {
  for (int64_t i = layers.begin; i < layers.end; ++i) ++weights_versions_[i];
  invertible_norms_.MarkStale();
}

absl::Status StackImpl::CopyNormVectors() {
  std::vector<float>& vectors = invertible_norms_.vectors();
  return backend_.CopyOut(vectors.data(),
                          weights_.master.as<float>() + parameters_.decayed_elements(),
                          vectors.size() * sizeof(float));
}

absl::Status StackImpl::CheckInvertible(LayerRange layers) {
  if (!config_.inverts_norms()) return absl::OkStatus();
  if (invertible_norms_.stale()) {
    LAMINA_RETURN_IF_ERROR(CopyNormVectors());
    LAMINA_RETURN_IF_ERROR(backend_.Synchronize());
    invertible_norms_.Judge();
  }
  return invertible_norms_.Check(layers);
}

// --- parameters ---

absl::StatusOr<ParameterInfo> StackImpl::FindParameter(const std::string& name) const {
  LAMINA_ASSIGN_OR_RETURN(ParameterLayout::Slot slot, parameters_.Find(name));
  return slot.info;
}

absl::StatusOr<size_t> StackImpl::ParameterBytes(const std::string& name,
                                                 ParameterPart part) const {
  LAMINA_ASSIGN_OR_RETURN(const ParameterLayout::Slot slot, parameters_.Find(name));
  return static_cast<size_t>(slot.info.shape.elements()) *
         SizeOf(part == ParameterPart::kWeights ? config_.dtype : DType::kF32);
}

absl::StatusOr<TensorView> StackImpl::PartView(const ParameterLayout::Slot& slot,
                                               ParameterPart part) const {
  const TensorView* flat = nullptr;
  switch (part) {
    case ParameterPart::kMaster:
      flat = &weights_.master;
      break;
    case ParameterPart::kWeights:
      flat = &weights_.weights;
      break;
    case ParameterPart::kGradient:
      flat = &training_.gradients;
      break;
    case ParameterPart::kMoment1:
      flat = &training_.m;
      break;
    case ParameterPart::kMoment2:
      flat = &training_.v;
      break;
  }
  if (flat == nullptr)
    return absl::InvalidArgumentError(
        absl::StrCat("no such parameter part: ", static_cast<int>(part)));
  if (!*flat)
    return absl::FailedPreconditionError(
        absl::StrCat(slot.info.name, ": gradients and moments are not kept while training is off"));
  return flat->Rows(slot.offset, slot.offset + slot.info.shape.elements());
}

absl::Status StackImpl::ReadParameter(const std::string& name, ParameterPart part, void* dst,
                                      size_t bytes, Memory memory) {
  LAMINA_ASSIGN_OR_RETURN(const ParameterLayout::Slot slot, parameters_.Find(name));
  LAMINA_ASSIGN_OR_RETURN(const TensorView view, PartView(slot, part));
  if (bytes != view.bytes())
    return absl::InvalidArgumentError(
        absl::StrCat(name, ": the buffer has ", bytes, " bytes; the parameter has ", view.bytes()));
  LAMINA_RETURN_IF_ERROR(memory == Memory::kDevice ? backend_.CopyWithin(dst, view.data, bytes)
                                                   : backend_.CopyOut(dst, view.data, bytes));
  return backend_.Synchronize();
}

absl::Status StackImpl::WriteParameter(const std::string& name, ParameterPart part, const void* src,
                                       size_t bytes, Memory memory) {
  LAMINA_ASSIGN_OR_RETURN(const ParameterLayout::Slot slot, parameters_.Find(name));
  LAMINA_ASSIGN_OR_RETURN(const TensorView view, PartView(slot, part));
  if (bytes != view.bytes())
    return absl::InvalidArgumentError(absl::StrCat(name, ": the values have ", bytes,
                                                   " bytes; the parameter has ", view.bytes()));
  const bool weights = part == ParameterPart::kWeights;
  if (weights || part == ParameterPart::kMaster) WeightsChanged({slot.layer, slot.layer + 1});
  LAMINA_RETURN_IF_ERROR(memory == Memory::kDevice ? backend_.CopyWithin(view.data, src, bytes)
                                                   : backend_.CopyIn(view.data, src, bytes));
  if ((weights || part == ParameterPart::kMaster) && config_.dtype != DType::kF32) {
    LAMINA_ASSIGN_OR_RETURN(
        const TensorView other,
        PartView(slot, weights ? ParameterPart::kMaster : ParameterPart::kWeights));
    LAMINA_RETURN_IF_ERROR(backend_.Cast(workspace_.ops, {.src = view, .dst = other}));
  }
  return backend_.Synchronize();
}

absl::StatusOr<TensorView> StackImpl::StagingView(Staging slot, DType dtype, const Shape& shape) {
  const auto index = static_cast<size_t>(slot);
  if (backend_.info().host_memory)
    return absl::FailedPreconditionError(
        absl::StrCat("staging: kernels of ", backend_.info().kind, " read host memory itself"));
  const TensorView view{workspace_.staging[index].data, dtype, shape};
  if (view.bytes() > workspace_.staging[index].bytes())
    return absl::InvalidArgumentError(
        absl::StrCat("staging: a tensor of shape ", shape.ToString(), " has ", view.bytes(),
                     " bytes; the largest call's has ", workspace_.staging[index].bytes()));
  return view;
}

}  // namespace

absl::StatusOr<std::unique_ptr<Stack>> Stack::Create(Backend& backend, const StackConfig& config) {
  auto stack = std::make_unique<StackImpl>(backend, config);
  LAMINA_RETURN_IF_ERROR(stack->Init());
  return stack;
}

double Stack::ForwardFlops(const StackConfig& config, int64_t layers, int64_t tokens,
                           double sum_of_squared_lengths) {
  const double h = static_cast<double>(config.hidden_size);
  const double i = static_cast<double>(config.intermediate_size);
  return static_cast<double>(layers) *
         (2.0 * static_cast<double>(tokens) * (4.0 * h * h + 2.0 * h * i) +
          4.0 * h * sum_of_squared_lengths);
}

}  // namespace lamina
