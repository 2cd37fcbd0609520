#include "lamina/transformer/stack.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "arena.h"
#include "initializer.h"
#include "layer.h"
#include "layout.h"
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

TensorView Tokens(const TensorView& batch_seq_hidden) {
  const Shape& s = batch_seq_hidden.shape;
  return batch_seq_hidden.Reshaped({s[0] * s[1], s[2]});
}

class StackImpl;

class StackContext final : public Context {
 public:
  ~StackContext() override { ranges->Give(offset, size); }
  LayerRange layers() const override { return range; }
  int64_t batch() const override { return call.dims.batch; }
  int64_t seq() const override { return call.dims.seq; }
  size_t bytes() const override { return size; }

  const StackImpl* owner = nullptr;
  RangeAllocator* ranges = nullptr;
  size_t offset = 0, size = 0;
  LayerRange range;
  LayerCall call;  // the dropout ratios of Forward included: Backward must use the same
  RngState rng{};  // host copy; the enqueued copy reads it
  ContextBuffers buffers;
  bool spent = false;
};

class StackImpl final : public Stack {
 public:
  StackImpl(Backend& backend, const StackConfig& config)
      : backend_(backend), config_(config), parameters_(config) {}

  absl::Status Init();

  const StackConfig& config() const override { return config_; }
  const MemoryPlan& plan() const override { return plan_; }

  absl::Status ForwardEval(const ForwardArgs& args) override;
  absl::StatusOr<std::unique_ptr<Context>> ForwardTraining(const ForwardArgs& args) override;
  absl::Status Backward(Context& context, const TensorView& output_grad,
                        const TensorView& input_grad) override;

  absl::Status ZeroGradients() override;
  absl::StatusOr<ApplyResult> ApplyGradients(const AdamWOptions& options) override;

  absl::Status SetDropout(double attn_ratio, double hidden_ratio) override;
  absl::Status SetTraining(bool training) override;

  const std::vector<ParameterInfo>& parameters() const override { return parameters_.parameters(); }
  absl::StatusOr<ParameterInfo> FindParameter(const std::string& name) const override;
  absl::Status ReadParameter(const std::string& name, ParameterPart part, void* dst,
                             size_t bytes) override;
  absl::Status WriteParameter(const std::string& name, ParameterPart part, const void* src,
                              size_t bytes) override;
  absl::StatusOr<size_t> ParameterBytes(const std::string& name, ParameterPart part) const override;

  StackCounters counters() const override { return counters_; }
  void set_counters(const StackCounters& counters) override { counters_ = counters; }

  size_t context_bytes_in_use() const override { return context_ranges_.in_use(); }
  size_t context_bytes_high_water() const override { return context_ranges_.high_water(); }

  absl::StatusOr<TensorView> StagingView(Staging slot, DType dtype, const Shape& shape) override;

 private:
  absl::Status CheckForward(const char* call, const ForwardArgs& args) const;
  absl::Status CheckFits(const MemoryPlan& plan, size_t bytes) const;
  LayerCall CallFor(const ForwardArgs& args) const;
  // The part of the flat buffer in which `slot` lies; FAILED_PRECONDITION where it isn't kept.
  absl::StatusOr<TensorView> PartView(const ParameterLayout::Slot& slot, ParameterPart part) const;
  absl::Status AllocateTraining();
  void MakeLayers();
  absl::Status InitializeWeights();
  absl::Status NeedTraining(const char* call) const;

  Backend& backend_;
  StackConfig config_;
  MemoryPlan plan_;
  ParameterLayout parameters_;
  StackCounters counters_;

  DeviceArena weights_arena_, workspace_arena_, training_arena_, context_arena_;
  WeightBuffers weights_;
  WorkspaceBuffers workspace_;
  TrainingBuffers training_;
  RangeAllocator context_ranges_;
  std::vector<Layer> layers_;
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
  LAMINA_ASSIGN_OR_RETURN(plan_, PlanStack(config_, backend_));
  LAMINA_RETURN_IF_ERROR(CheckFits(plan_, plan_.Total()));

  Placer weights_size(nullptr);
  PlaceWeights(weights_size, config_, parameters_);
  LAMINA_ASSIGN_OR_RETURN(weights_arena_, DeviceArena::Allocate(backend_, weights_size.bytes()));
  Placer weights(weights_arena_.data());
  weights_ = PlaceWeights(weights, config_, parameters_);

  Placer workspace_size(nullptr);
  PlaceWorkspace(workspace_size, config_, backend_);
  LAMINA_ASSIGN_OR_RETURN(workspace_arena_,
                          DeviceArena::Allocate(backend_, workspace_size.bytes()));
  Placer workspace(workspace_arena_.data());
  workspace_ = PlaceWorkspace(workspace, config_, backend_);
  const TensorView& zeros = workspace_.scratch.zeros;
  LAMINA_RETURN_IF_ERROR(backend_.SetZero(zeros.data, zeros.bytes()));

  if (config_.training) LAMINA_RETURN_IF_ERROR(AllocateTraining());
  MakeLayers();
  LAMINA_RETURN_IF_ERROR(InitializeWeights());
  return backend_.Synchronize();
}

// Changes nothing where it fails.
absl::Status StackImpl::AllocateTraining() {
  Placer size(nullptr);
  PlaceTraining(size, config_, parameters_);
  const size_t context_bytes = ContextBytes(config_, backend_, config_.num_hidden_layers,
                                            config_.batch_size, config_.max_seq_length) *
                               static_cast<size_t>(config_.max_contexts);
  LAMINA_ASSIGN_OR_RETURN(DeviceArena training, DeviceArena::Allocate(backend_, size.bytes()));
  LAMINA_ASSIGN_OR_RETURN(DeviceArena contexts, DeviceArena::Allocate(backend_, context_bytes));
  Placer placer(training.data());
  const TrainingBuffers buffers = PlaceTraining(placer, config_, parameters_);
  for (const TensorView& t : {buffers.gradients, buffers.m, buffers.v})
    LAMINA_RETURN_IF_ERROR(backend_.SetZero(t.data, t.bytes()));

  training_arena_ = std::move(training);
  training_ = buffers;
  context_arena_ = std::move(contexts);
  context_ranges_ = RangeAllocator(context_bytes);
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

absl::Status StackImpl::SetTraining(bool training) {
  if (training == config_.training) return absl::OkStatus();
  if (!training) {
    if (context_ranges_.taken() > 0)
      return absl::FailedPreconditionError(
          absl::StrCat("SetTraining(false): ", context_ranges_.taken(),
                       " activation contexts are outstanding; release them first"));
    // Enqueued work may still use what is freed here.
    LAMINA_RETURN_IF_ERROR(backend_.Synchronize());
  }
  StackConfig wanted = config_;
  wanted.training = training;
  LAMINA_ASSIGN_OR_RETURN(MemoryPlan plan, PlanStack(wanted, backend_));
  if (training) {
    LAMINA_RETURN_IF_ERROR(CheckFits(plan, plan.Total() - plan_.Total()));
    LAMINA_RETURN_IF_ERROR(AllocateTraining());
  } else {
    training_ = TrainingBuffers{};
    training_arena_.Reset();
    context_arena_.Reset();
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
  const Shape& shape = args.input.shape;
  if (shape.rank() != 3 || shape[0] < 1 || shape[0] > config_.batch_size || shape[1] < 1 ||
      shape[1] > config_.max_seq_length || shape[2] != config_.hidden_size)
    return absl::InvalidArgumentError(
        absl::StrCat(call, ": input has shape ", shape.ToString(), "; it must be [B, S, ",
                     config_.hidden_size, "] with B in [1, ", config_.batch_size,
                     "] (batch_size) and S in [1, ", config_.max_seq_length, "] (max_seq_length)"));
  LAMINA_RETURN_IF_ERROR(CheckTensor(call, "input", args.input, config_.dtype, shape));
  LAMINA_RETURN_IF_ERROR(CheckTensor(call, "output", args.output, config_.dtype, shape));
  if (args.mask && args.lengths)
    return absl::InvalidArgumentError(
        absl::StrCat(call, ": both mask and lengths are present; give one of the two"));
  if (args.mask)
    LAMINA_RETURN_IF_ERROR(CheckTensor(call, "mask", args.mask, DType::kF32, {shape[0], shape[1]}));
  if (args.lengths)
    LAMINA_RETURN_IF_ERROR(CheckTensor(call, "lengths", args.lengths, DType::kI32, {shape[0]}));
  for (const auto& [name, tensor] : {std::pair("input", args.input), std::pair("mask", args.mask),
                                     std::pair("lengths", args.lengths)})
    if (Overlap(tensor, args.output))
      return absl::InvalidArgumentError(absl::StrCat(call, ": output overlaps ", name));
  const LayerDims dims = config_.Dims(shape[0], shape[1]);
  if (backend_.WorkspaceBytes(dims) > workspace_.ops.bytes)
    return absl::InternalError(absl::StrCat(
        call, ": the backend wants ", backend_.WorkspaceBytes(dims), " workspace bytes for ",
        shape.ToString(), ", more than the ", workspace_.ops.bytes, " for the largest call"));
  return absl::OkStatus();
}

LayerCall StackImpl::CallFor(const ForwardArgs& args) const {
  return LayerCall{.dims = config_.Dims(args.input.shape[0], args.input.shape[1]),
                   .pre_layer_norm = config_.pre_layer_norm,
                   .gelu = config_.gelu,
                   .eps = static_cast<float>(config_.layer_norm_eps),
                   .mask = args.mask,
                   .lengths = args.lengths,
                   .workspace = workspace_.ops};
}

absl::Status StackImpl::ForwardEval(const ForwardArgs& args) {
  LAMINA_RETURN_IF_ERROR(CheckForward("Forward", args));
  const LayerCall call = CallFor(args);
  const LayerActivations activations =
      ScratchActivations(call.dims, CutScratch(workspace_.scratch, call.dims));
  // Outputs alternate between the chain buffer and the caller's, so that the last is the caller's.
  TensorView x = Tokens(args.input);
  const TensorView output = Tokens(args.output);
  const TensorView chain = workspace_.chain.Reshaped(output.shape);
  for (int64_t i = args.layers.begin; i < args.layers.end; ++i) {
    const TensorView y = (args.layers.end - 1 - i) % 2 == 0 ? output : chain;
    LAMINA_RETURN_IF_ERROR(layers_[static_cast<size_t>(i)].Forward(call, x, activations, y));
    x = y;
  }
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<Context>> StackImpl::ForwardTraining(const ForwardArgs& args) {
  LAMINA_RETURN_IF_ERROR(NeedTraining("Forward"));
  LAMINA_RETURN_IF_ERROR(CheckForward("Forward", args));
  const int64_t batch = args.input.shape[0], seq = args.input.shape[1];
  const int64_t layers = args.layers.end - args.layers.begin;
  const size_t bytes = ContextBytes(config_, backend_, layers, batch, seq);
  const absl::StatusOr<size_t> offset = context_ranges_.Take(bytes);
  if (!offset.ok())
    return absl::ResourceExhaustedError(
        absl::StrCat("Forward: no room for the activation context of ", layers, " layers at [",
                     batch, ", ", seq, "]: ", offset.status().message(),
                     "; release a context, or create the stack with larger max_contexts"));
  auto context = std::make_unique<StackContext>();
  StackContext& c = *context;
  c.owner = this;
  c.ranges = &context_ranges_;
  c.offset = *offset;
  c.size = bytes;
  c.range = args.layers;
  Placer placer(static_cast<char*>(context_arena_.data()) + c.offset);
  c.buffers = PlaceContext(placer, config_, backend_, layers, batch, seq);

  c.call = CallFor(args);
  c.call.attn_dropout = static_cast<float>(config_.attn_dropout_ratio);
  c.call.hidden_dropout = static_cast<float>(config_.hidden_dropout_ratio);
  c.call.rng = c.buffers.rng;
  c.call.mask = args.mask ? c.buffers.mask : TensorView{};
  c.call.lengths = args.lengths ? c.buffers.lengths : TensorView{};
  c.rng = RngState{static_cast<uint64_t>(config_.seed), counters_.rng_counter};
  LAMINA_RETURN_IF_ERROR(backend_.CopyIn(c.buffers.rng, &c.rng, sizeof(c.rng)));
  for (const auto& [copy, original] :
       {std::pair(c.buffers.input, args.input), std::pair(c.call.mask, args.mask),
        std::pair(c.call.lengths, args.lengths)})
    if (original)
      LAMINA_RETURN_IF_ERROR(backend_.CopyWithin(copy.data, original.data, original.bytes()));

  TensorView x = c.buffers.input;
  for (int64_t i = 0; i < layers; ++i) {
    const ContextBuffers::SavedLayer& saved = c.buffers.layers[static_cast<size_t>(i)];
    const TensorView y = saved.output ? saved.output : Tokens(args.output);
    const Layer& layer = layers_[static_cast<size_t>(args.layers.begin + i)];
    LAMINA_RETURN_IF_ERROR(layer.Forward(c.call, x, saved.activations, y));
    x = y;
  }
  ++counters_.rng_counter;
  return context;
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
  const Shape shape{c->batch(), c->seq(), config_.hidden_size};
  LAMINA_RETURN_IF_ERROR(CheckTensor("Backward", "output_grad", output_grad, config_.dtype, shape));
  if (input_grad)
    LAMINA_RETURN_IF_ERROR(CheckTensor("Backward", "input_grad", input_grad, config_.dtype, shape));
  if (Overlap(output_grad, input_grad))
    return absl::InvalidArgumentError("Backward: input_grad overlaps output_grad");

  c->spent = true;  // from here on gradients change
  const LayerScratch scratch = CutScratch(workspace_.scratch, c->call.dims);
  TensorView dy = Tokens(output_grad);
  TensorView chain = workspace_.chain.Reshaped(dy.shape);
  TensorView other_chain = training_.chain.Reshaped(dy.shape);
  for (size_t i = c->buffers.layers.size(); i-- > 0;) {
    const ContextBuffers::SavedLayer& saved = c->buffers.layers[i];
    const TensorView x = i == 0 ? c->buffers.input : c->buffers.layers[i - 1].output;
    const TensorView dx = i == 0 && input_grad ? Tokens(input_grad) : chain;
    const Layer& layer = layers_[static_cast<size_t>(c->range.begin) + i];
    LAMINA_RETURN_IF_ERROR(layer.Backward(c->call, x, saved.activations, dy, scratch, dx));
    dy = dx;
    std::swap(chain, other_chain);
  }
  return absl::OkStatus();
}

absl::Status StackImpl::ZeroGradients() {
  LAMINA_RETURN_IF_ERROR(NeedTraining("ZeroGradients"));
  return backend_.SetZero(training_.gradients.data, training_.gradients.bytes());
}

absl::StatusOr<ApplyResult> StackImpl::ApplyGradients(const AdamWOptions& options) {
  LAMINA_RETURN_IF_ERROR(NeedTraining("ApplyGradients"));
  LAMINA_RETURN_IF_ERROR(CheckOptions(options));
  const OptimizerBuffers buffers{.weights = weights_.weights,
                                 .master = weights_.master,
                                 .gradients = training_.gradients,
                                 .m = training_.m,
                                 .v = training_.v,
                                 .control = training_.control,
                                 .decayed_elements = parameters_.decayed_elements()};
  LAMINA_ASSIGN_OR_RETURN(
      const OptimizerControl control,
      AdamWStep(backend_, workspace_.ops, buffers, options, counters_.optimizer_step + 1));
  const bool applied = control.skip == 0;
  ++(applied ? counters_.optimizer_step : counters_.skipped_steps);
  return ApplyResult{
      .applied = applied, .grad_norm = control.grad_norm, .step = counters_.optimizer_step};
}

absl::Status StackImpl::SetDropout(double attn_ratio, double hidden_ratio) {
  LAMINA_RETURN_IF_ERROR(CheckDropoutRatio("attn_dropout_ratio", attn_ratio));
  LAMINA_RETURN_IF_ERROR(CheckDropoutRatio("hidden_dropout_ratio", hidden_ratio));
  config_.attn_dropout_ratio = attn_ratio;
  config_.hidden_dropout_ratio = hidden_ratio;
  return absl::OkStatus();
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
                                      size_t bytes) {
  LAMINA_ASSIGN_OR_RETURN(const ParameterLayout::Slot slot, parameters_.Find(name));
  LAMINA_ASSIGN_OR_RETURN(const TensorView view, PartView(slot, part));
  if (bytes != view.bytes())
    return absl::InvalidArgumentError(
        absl::StrCat(name, ": the buffer has ", bytes, " bytes; the parameter has ", view.bytes()));
  LAMINA_RETURN_IF_ERROR(backend_.CopyOut(dst, view.data, bytes));
  return backend_.Synchronize();
}

absl::Status StackImpl::WriteParameter(const std::string& name, ParameterPart part, const void* src,
                                       size_t bytes) {
  LAMINA_ASSIGN_OR_RETURN(const ParameterLayout::Slot slot, parameters_.Find(name));
  LAMINA_ASSIGN_OR_RETURN(const TensorView view, PartView(slot, part));
  if (bytes != view.bytes())
    return absl::InvalidArgumentError(absl::StrCat(name, ": the values have ", bytes,
                                                   " bytes; the parameter has ", view.bytes()));
  LAMINA_RETURN_IF_ERROR(backend_.CopyIn(view.data, src, bytes));
  const bool weights = part == ParameterPart::kWeights;
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

double Stack::ForwardFlops(const StackConfig& config, int64_t layers, int64_t batch, int64_t seq) {
  const double h = static_cast<double>(config.hidden_size);
  const double i = static_cast<double>(config.intermediate_size);
  const double tokens = static_cast<double>(batch) * static_cast<double>(seq);
  return static_cast<double>(layers) *
         (2.0 * tokens * (4.0 * h * h + 2.0 * h * i) + 4.0 * tokens * static_cast<double>(seq) * h);
}

}  // namespace lamina
