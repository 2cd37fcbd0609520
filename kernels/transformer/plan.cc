#include "lamina/transformer/plan.h"

#include <limits>

#include "absl/strings/str_cat.h"
#include "layout.h"

namespace lamina {

const char* Name(MemoryKind kind) {
  switch (kind) {
    case MemoryKind::kWeights:
      return "weights";
    case MemoryKind::kMasterWeights:
      return "master_weights";
    case MemoryKind::kGradients:
      return "gradients";
    case MemoryKind::kOptimizer:
      return "optimizer";
    case MemoryKind::kActivations:
      return "activations";
    case MemoryKind::kWorkspace:
      return "workspace";
    case MemoryKind::kStaging:
      return "staging";
    case MemoryKind::kGraphs:
      return "graphs";
  }
  return "invalid";
}

size_t MemoryPlan::Bytes(MemoryKind kind) const {
  size_t bytes = 0;
  for (const PlanEntry& entry : entries)
    if (entry.kind == kind) bytes = SaturatingAdd(bytes, entry.bytes);
  return bytes;
}

size_t MemoryPlan::Total() const {
  size_t bytes = 0;
  for (const PlanEntry& entry : entries) bytes = SaturatingAdd(bytes, entry.bytes);
  return bytes;
}

size_t ContextBytes(const StackConfig& config, const OpSizes& sizes, int64_t layers,
                    const LayerDims& dims) {
  Placer placer(nullptr);
  PlaceContext(placer, config, layers, dims, sizes.AttentionSavedBytes(dims));
  return placer.bytes();
}

absl::StatusOr<MemoryPlan> PlanStack(const StackConfig& config, const OpSizes& sizes) {
  MemoryPlan plan;
  const ParameterLayout parameters(config);
  Placer placer(nullptr, &plan.entries);
  PlaceWeights(placer, config, parameters);
  if (config.training) {
    PlaceTraining(placer, config, parameters);
    std::vector<PlanEntry> context;
    Placer context_placer(nullptr, &context);
    PlaceLargestContext(context_placer, config, sizes);
    plan.context_bytes = context_placer.bytes();
    for (PlanEntry& entry : context) {
      entry.bytes = SaturatingMultiply(entry.bytes, static_cast<size_t>(config.max_contexts));
      entry.instances *= config.max_contexts;
      plan.entries.push_back(std::move(entry));
    }
    PlaceLargestRecompute(placer, config, sizes);
  }
  PlaceWorkspace(placer, config, sizes);
  // Not placed in an arena: the driver takes it, step by step.
  if (sizes.StepCacheBytes() > 0)
    plan.entries.push_back(
        {.kind = MemoryKind::kGraphs, .name = "graphs", .bytes = sizes.StepCacheBytes()});
  if (plan.Total() == std::numeric_limits<size_t>::max())
    return absl::InvalidArgumentError(absl::StrCat(
        "config: the stack's bytes overflow 63 bits: batch_size ", config.batch_size,
        ", max_seq_length ", config.max_seq_length, ", hidden_size ", config.hidden_size,
        ", intermediate_size ", config.intermediate_size, ", num_hidden_layers ",
        config.num_hidden_layers, ", max_contexts ", config.max_contexts));
  return plan;
}

}  // namespace lamina
