#include "layout.h"

#include <algorithm>
#include <limits>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"

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

void* Placer::PlaceBytes(MemoryKind kind, const BufferName& name, size_t bytes) {
  const size_t padded =
      SaturatingAdd(bytes, kArenaAlignment - 1) / kArenaAlignment * kArenaAlignment;
  void* data = base_ == nullptr ? nullptr : base_ + bytes_;
  bytes_ = SaturatingAdd(bytes_, bytes > kLargest ? kOverflow : padded);
  if (entries_ != nullptr) {
    std::string full_name =
        name.owner.empty() ? std::string(name.part) : absl::StrCat(name.owner, ".", name.part);
    const auto same = std::find_if(entries_->begin(), entries_->end(), [&](const PlanEntry& e) {
      return e.kind == kind && e.name == full_name;
    });
    if (same == entries_->end()) {
      entries_->push_back({kind, std::move(full_name), padded, 1});
    } else {
      same->bytes = SaturatingAdd(same->bytes, padded);
      ++same->instances;
    }
  }
  return data;
}

TensorView Placer::Place(MemoryKind kind, const BufferName& name, DType dtype, const Shape& shape) {
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

LayerDims LargestDenseCall(const StackConfig& config) {
  return config.Dims(config.batch_size, config.max_seq_length);
}

LayerDims LargestPackedCall(const StackConfig& config) {
  const int64_t tokens = config.batch_size * config.max_seq_length;
  return config.Dims(tokens, config.max_seq_length, tokens);
}

WorkspaceBuffers PlaceWorkspace(Placer& placer, const StackConfig& config, const OpSizes& sizes) {
  constexpr MemoryKind kKind = MemoryKind::kWorkspace;
  const LayerDims dims = LargestDenseCall(config);
  const int64_t tokens = dims.tokens();
  const Shape token_vectors{tokens, dims.hidden};
  WorkspaceBuffers b;
  b.ops.bytes =
      std::max(sizes.WorkspaceBytes(dims), sizes.WorkspaceBytes(LargestPackedCall(config)));
  b.ops.data = placer.PlaceBytes(kKind, "workspace.ops", b.ops.bytes);
  LayerScratch& s = b.scratch;
  s.wide = placer.Place(kKind, "workspace.wide", config.dtype,
                        {tokens, std::max(3 * dims.hidden, dims.intermediate)});
  s.product = placer.Place(kKind, "workspace.product", config.dtype, token_vectors);
  s.branch = placer.Place(kKind, "workspace.branch", config.dtype, token_vectors);
  s.sum = placer.Place(kKind, "workspace.sum", config.dtype, token_vectors);
  b.chain = placer.Place(kKind, "workspace.chain", config.dtype, token_vectors);
  if (!sizes.host_memory()) {
    const int64_t act_bytes = tokens * dims.hidden * static_cast<int64_t>(SizeOf(config.dtype));
    constexpr MemoryKind kStaging = MemoryKind::kStaging;
    b.staging[0] = placer.Place(kStaging, "staging.input", DType::kU8, {act_bytes});
    b.staging[1] = placer.Place(kStaging, "staging.output", DType::kU8, {act_bytes});
    b.staging[2] = placer.Place(kStaging, "staging.mask", DType::kU8, {tokens * 4});
    b.staging[3] = placer.Place(kStaging, "staging.lengths", DType::kU8, {dims.batch * 4});
    b.staging[4] = placer.Place(kStaging, "staging.cu_seqlens", DType::kU8, {(tokens + 1) * 4});
    b.staging[5] = placer.Place(kStaging, "staging.input_ahead", DType::kU8, {act_bytes});
    b.staging[6] = placer.Place(kStaging, "staging.output_behind", DType::kU8, {act_bytes});
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
  constexpr MemoryKind kKind = MemoryKind::kOptimizer;
  TrainingBuffers b;
  const Shape flat{parameters.elements()};
  b.gradients = placer.Place(MemoryKind::kGradients, "gradients", DType::kF32, flat);
  b.m = placer.Place(kKind, "optimizer.m", DType::kF32, flat);
  b.v = placer.Place(kKind, "optimizer.v", DType::kF32, flat);
  b.control = placer.Place<OptimizerControl>(kKind, "optimizer.control", 1);
  b.segments = placer.Place<LambSegment>(kKind, "lamb.segments",
                                         static_cast<int64_t>(parameters.parameters().size()));
  b.chain = placer.Place(MemoryKind::kWorkspace, "workspace.chain", config.dtype,
                         {config.batch_size * config.max_seq_length, config.hidden_size});
  return b;
}

LayerActivations PlaceActivations(Placer& placer, MemoryKind kind, absl::string_view owner,
                                  const StackConfig& config, const LayerDims& dims,
                                  size_t attn_saved_bytes) {
  const int64_t tokens = dims.tokens();
  const Shape token_vectors{tokens, dims.hidden};
  const Shape inter{tokens, dims.intermediate};
  const auto act = [&](const char* name, const Shape& shape) {
    return placer.Place(kind, {owner, name}, config.dtype, shape);
  };
  const auto per_token = [&](const char* name) {
    return placer.Place(kind, {owner, name}, DType::kF32, {tokens});
  };
  // Which of a norm's two sources of normalised values Backward has: its input and mean, of which
  // it makes the output again, or its output.
  const bool norm_inputs = !config.inverts_norms();

  LayerActivations a;
  if (config.pre_layer_norm && !norm_inputs) a.attn_in = act("attn_in", token_vectors);
  a.qkv = act("qkv", {tokens, 3 * dims.hidden});
  a.attn_saved = placer.Place(kind, {owner, "attn_saved"}, DType::kU8,
                              {static_cast<int64_t>(attn_saved_bytes)});
  // Neither the probabilities nor what dropout leaves of them is kept, with or without
  // attn_dropout_checkpoint: attn_saved is enough to compute both again. The entry says so.
  placer.PlaceBytes(kind, {owner, "attn_dropout"}, 0);
  a.attn_out = act("attn_out", token_vectors);
  if (norm_inputs) {
    a.attn_sum = act("attn_sum", token_vectors);
    a.attn_mean = per_token("attn_mean");
  }
  a.attn_rstd = per_token("attn_rstd");
  if (!norm_inputs) a.ffn_in = act("ffn_in", token_vectors);
  a.inter_pre = act("inter_pre", inter);
  if (!config.gelu_checkpoint) a.inter = act("inter", inter);
  if (norm_inputs) {
    if (!config.pre_layer_norm) a.ffn_sum = act("ffn_sum", token_vectors);
    a.norm_mean = per_token("norm_mean");
  }
  a.norm_rstd = per_token("norm_rstd");
  return a;
}

ContextBuffers PlaceContext(Placer& placer, const StackConfig& config, int64_t layers,
                            const LayerDims& dims, size_t attn_saved_bytes) {
  constexpr MemoryKind kKind = MemoryKind::kActivations;
  const Shape token_vectors{dims.tokens(), dims.hidden};
  // What a layer reads is in Pre-LN its first norm's input, in Post-LN the output of the norm
  // below.
  const bool inverts = config.inverts_norms();
  const bool input = !config.pre_layer_norm || !inverts;
  const bool outputs = config.activation_checkpointing || config.pre_layer_norm != inverts;
  const bool last_output = !config.activation_checkpointing && !config.pre_layer_norm && inverts;

  ContextBuffers b;
  b.rng = placer.Place<RngState>(kKind, "context.rng", 1);
  b.keys = placer.Place<int32_t>(kKind, "context.keys", dims.tokens() + 1);
  if (input) b.input = placer.Place(kKind, "context.input", config.dtype, token_vectors);
  b.layers.resize(static_cast<size_t>(layers));
  for (size_t i = 0; i < b.layers.size(); ++i) {
    ContextBuffers::SavedLayer& layer = b.layers[i];
    if (!config.activation_checkpointing)
      layer.activations = PlaceActivations(placer, kKind, "layer", config, dims, attn_saved_bytes);
    if (i + 1 < b.layers.size() ? outputs : last_output)
      layer.output = placer.Place(kKind, "layer.output", config.dtype, token_vectors);
  }
  return b;
}

namespace {

size_t LargestAttentionSaved(const StackConfig& config, const OpSizes& sizes) {
  return std::max(sizes.AttentionSavedBytes(LargestDenseCall(config)),
                  sizes.AttentionSavedBytes(LargestPackedCall(config)));
}

}  // namespace

void PlaceLargestRecompute(Placer& placer, const StackConfig& config, const OpSizes& sizes) {
  if (config.activation_checkpointing)
    PlaceActivations(placer, MemoryKind::kWorkspace, "recompute", config, LargestDenseCall(config),
                     LargestAttentionSaved(config, sizes));
}

ContextBuffers PlaceLargestContext(Placer& placer, const StackConfig& config,
                                   const OpSizes& sizes) {
  return PlaceContext(placer, config, config.num_hidden_layers, LargestDenseCall(config),
                      LargestAttentionSaved(config, sizes));
}

}  // namespace lamina
