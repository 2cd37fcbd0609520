#include "layout.h"

#include <algorithm>
#include <limits>
#include <string>

namespace lamina {
namespace {

constexpr size_t kOverflow = std::numeric_limits<size_t>::max();
constexpr size_t kLargest = kOverflow / 2;

}  // namespace

size_t SaturatingAdd(size_t a, size_t b) {
  return a > kLargest || b > kLargest - a ? kOverflow : a + b;
}

size_t SaturatingMultiply(size_t a, size_t b) {
  size_t product = 0;
  if (a > kLargest || b > kLargest || __builtin_mul_overflow(a, b, &product) || product > kLargest)
    return kOverflow;
  return product;
}

void* Placer::PlaceBytes(MemoryKind kind, absl::string_view name, size_t bytes) {
  const size_t padded =
      SaturatingAdd(bytes, kArenaAlignment - 1) / kArenaAlignment * kArenaAlignment;
  void* data = base_ == nullptr ? nullptr : base_ + bytes_;
  bytes_ = SaturatingAdd(bytes_, bytes > kLargest ? kOverflow : padded);
  if (entries_ != nullptr) {
    const auto same = std::find_if(entries_->begin(), entries_->end(), [&](const PlanEntry& e) {
      return e.kind == kind && e.name == name;
    });
    if (same == entries_->end()) {
      entries_->push_back({kind, std::string(name), padded, 1});
    } else {
      same->bytes = SaturatingAdd(same->bytes, padded);
      ++same->instances;
    }
  }
  return data;
}

TensorView Placer::Place(MemoryKind kind, absl::string_view name, DType dtype, const Shape& shape) {
  size_t bytes = SizeOf(dtype);
  for (int i = 0; i < shape.rank(); ++i)
    bytes = SaturatingMultiply(bytes, static_cast<size_t>(shape[i]));
  return TensorView{PlaceBytes(kind, name, bytes), dtype, shape};
}

WeightBuffers PlaceWeights(Placer& placer, const StackConfig& config,
                           const ParameterLayout& parameters) {
  WeightBuffers b;
  const Shape flat{parameters.elements()};
  b.weights = placer.Place(MemoryKind::kWeights, "weights", config.dtype, flat);
  b.master = config.dtype == DType::kF32
                 ? b.weights
                 : placer.Place(MemoryKind::kMasterWeights, "master_weights", DType::kF32, flat);
  return b;
}

WorkspaceBuffers PlaceWorkspace(Placer& placer, const StackConfig& config, const Backend& backend) {
  constexpr MemoryKind kKind = MemoryKind::kWorkspace;
  const LayerDims dims = config.Dims(config.batch_size, config.max_seq_length);
  const int64_t tokens = dims.tokens();
  const Shape token_vectors{tokens, dims.hidden};
  WorkspaceBuffers b;
  b.ops.bytes = backend.WorkspaceBytes(dims);
  b.ops.data = placer.PlaceBytes(kKind, "workspace.ops", b.ops.bytes);
  LayerScratch& s = b.scratch;
  s.wide = placer.Place(kKind, "workspace.wide", config.dtype,
                        {tokens, std::max(3 * dims.hidden, dims.intermediate)});
  s.product = placer.Place(kKind, "workspace.product", config.dtype, token_vectors);
  s.branch = placer.Place(kKind, "workspace.branch", config.dtype, token_vectors);
  s.sum = placer.Place(kKind, "workspace.sum", config.dtype, token_vectors);
  s.zeros = placer.Place(kKind, "workspace.zeros", config.dtype, {dims.hidden});
  b.chain = placer.Place(kKind, "workspace.chain", config.dtype, token_vectors);
  if (!backend.info().host_memory) {
    const int64_t act_bytes = tokens * dims.hidden * static_cast<int64_t>(SizeOf(config.dtype));
    constexpr MemoryKind kStaging = MemoryKind::kStaging;
    b.staging[0] = placer.Place(kStaging, "staging.input", DType::kU8, {act_bytes});
    b.staging[1] = placer.Place(kStaging, "staging.output", DType::kU8, {act_bytes});
    b.staging[2] = placer.Place(kStaging, "staging.mask", DType::kU8, {tokens * 4});
    b.staging[3] = placer.Place(kStaging, "staging.lengths", DType::kU8, {dims.batch * 4});
  }
  return b;
}

LayerScratch CutScratch(const LayerScratch& scratch, const LayerDims& dims) {
  LayerScratch cut = scratch;
  for (TensorView LayerScratch::*view :
       {&LayerScratch::product, &LayerScratch::branch, &LayerScratch::sum})
    (cut.*view).shape = {dims.tokens(), dims.hidden};
  cut.wide.shape = {dims.tokens(), std::max(3 * dims.hidden, dims.intermediate)};
  return cut;
}

TrainingBuffers PlaceTraining(Placer& placer, const StackConfig& config,
                              const ParameterLayout& parameters) {
  TrainingBuffers b;
  const Shape flat{parameters.elements()};
  b.gradients = placer.Place(MemoryKind::kGradients, "gradients", DType::kF32, flat);
  b.m = placer.Place(MemoryKind::kOptimizer, "adamw.m", DType::kF32, flat);
  b.v = placer.Place(MemoryKind::kOptimizer, "adamw.v", DType::kF32, flat);
  b.control = placer.Place<OptimizerControl>(MemoryKind::kOptimizer, "adamw.control", 1);
  b.chain = placer.Place(MemoryKind::kWorkspace, "workspace.chain", config.dtype,
                         {config.batch_size * config.max_seq_length, config.hidden_size});
  return b;
}

ContextBuffers PlaceContext(Placer& placer, const StackConfig& config, const Backend& backend,
                            int64_t layers, int64_t batch, int64_t seq) {
  constexpr MemoryKind kKind = MemoryKind::kActivations;
  const LayerDims dims = config.Dims(batch, seq);
  const int64_t tokens = dims.tokens();
  const Shape token_vectors{tokens, dims.hidden};
  const Shape inter{tokens, dims.intermediate};
  const Shape per_token{tokens};
  const Shape attn_saved{static_cast<int64_t>(backend.AttentionSavedBytes(dims))};
  const auto act = [&](absl::string_view name, const Shape& shape) {
    return placer.Place(kKind, name, config.dtype, shape);
  };
  const auto fp32 = [&](absl::string_view name, const Shape& shape) {
    return placer.Place(kKind, name, DType::kF32, shape);
  };

  ContextBuffers b;
  b.rng = placer.Place<RngState>(kKind, "context.rng", 1);
  b.mask = fp32("context.mask", {batch, seq});
  b.lengths = placer.Place(kKind, "context.lengths", DType::kI32, {batch});
  b.input = act("context.input", token_vectors);
  b.layers.resize(static_cast<size_t>(layers));
  for (size_t i = 0; i < b.layers.size(); ++i) {
    LayerActivations& a = b.layers[i].activations;
    if (config.pre_layer_norm) a.attn_in = act("layer.attn_in", token_vectors);
    a.qkv = act("layer.qkv", {tokens, 3 * dims.hidden});
    a.attn_saved = placer.Place(kKind, "layer.attn_saved", DType::kU8, attn_saved);
    a.attn_out = act("layer.attn_out", token_vectors);
    a.attn_sum = act("layer.attn_sum", token_vectors);
    a.attn_mean = fp32("layer.attn_mean", per_token);
    a.attn_rstd = fp32("layer.attn_rstd", per_token);
    a.ffn_in = act("layer.ffn_in", token_vectors);
    a.inter_pre = act("layer.inter_pre", inter);
    a.inter = act("layer.inter", inter);
    if (!config.pre_layer_norm) a.ffn_sum = act("layer.ffn_sum", token_vectors);
    a.norm_mean = fp32("layer.norm_mean", per_token);
    a.norm_rstd = fp32("layer.norm_rstd", per_token);
    // The last output is the caller's; no Backward reads it.
    if (i + 1 < b.layers.size()) b.layers[i].output = act("layer.output", token_vectors);
  }
  return b;
}

}  // namespace lamina
