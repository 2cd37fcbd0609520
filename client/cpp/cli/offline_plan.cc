#include "cli/offline_plan.h"

#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "cli/config_json.h"
#include "lamina/kernels/backend.h"
#include "lamina/transformer/plan.h"
#include "nlohmann/json.hpp"

namespace lamina::cli {
namespace {

struct Model {
  const char* name;
  int64_t hidden, intermediate, heads, layers;
  bool decoder;  // GPT-2's layer: Pre-LN, causal, tanh; else BERT's
};
constexpr Model kModels[] = {
    {"minilm-l6", 384, 1536, 12, 6, false},    {"bert-base", 768, 3072, 12, 12, false},
    {"bert-large", 1024, 4096, 16, 24, false}, {"gpt2", 768, 3072, 12, 12, true},
    {"gpt2-medium", 1024, 4096, 16, 24, true}, {"gpt2-large", 1280, 5120, 20, 36, true},
    {"gpt2-xl", 1600, 6400, 25, 48, true},
};

struct Offline {
  lamina::StackConfig config;
  std::unique_ptr<const OpSizes> sizes;
};

// Both libraries write a config as JSON with the same names.
absl::StatusOr<Offline> Prepare(const client::StackConfig& config, const std::string& device) {
  absl::StatusOr<lamina::StackConfig> own = StackConfigFromJson(cli::ToJson(config).dump());
  if (!own.ok()) return own.status();
  absl::StatusOr<std::unique_ptr<const OpSizes>> sizes = OpSizes::Of(device);
  if (!sizes.ok()) return sizes.status();
  return Offline{.config = *std::move(own), .sizes = *std::move(sizes)};
}

}  // namespace

absl::StatusOr<nlohmann::json> ModelFields(const std::string& name) {
  for (const Model& model : kModels) {
    if (name != model.name) continue;
    return nlohmann::json{{"hidden_size", model.hidden},
                          {"intermediate_size", model.intermediate},
                          {"heads", model.heads},
                          {"num_hidden_layers", model.layers},
                          {"pre_layer_norm", model.decoder},
                          {"causal", model.decoder},
                          {"gelu", model.decoder ? "tanh" : "erf"},
                          {"attn_dropout_ratio", 0.1},
                          {"hidden_dropout_ratio", 0.1}};
  }
  return absl::InvalidArgumentError(
      absl::StrCat("there is no model '", name, "'; known are ", ModelNames()));
}

std::string ModelNames() {
  std::string names;
  for (const Model& model : kModels) {
    absl::StrAppend(&names, names.empty() ? "" : ", ", model.name);
  }
  return names;
}

absl::StatusOr<client::MemoryPlan> PlanOffline(const client::StackConfig& config,
                                               const std::string& device) {
  const absl::StatusOr<Offline> offline = Prepare(config, device);
  if (!offline.ok()) return offline.status();
  const absl::StatusOr<lamina::StackConfig> resolved =
      Resolve(offline->config, std::max(0, config.local_rank));
  if (!resolved.ok()) return resolved.status();
  const absl::StatusOr<lamina::MemoryPlan> plan = PlanStack(*resolved, *offline->sizes);
  if (!plan.ok()) return plan.status();
  client::MemoryPlan result;
  for (const PlanEntry& entry : plan->entries) {
    // The contract's kinds are these, after "unspecified".
    result.entries.push_back(
        {.kind = static_cast<client::MemoryKind>(static_cast<int>(entry.kind) + 1),
         .name = entry.name,
         .bytes = entry.bytes,
         .instances = entry.instances});
  }
  result.total_bytes = plan->Total();
  result.context_bytes = plan->context_bytes;
  return result;
}

absl::StatusOr<std::vector<Capacity>> CapacityOffline(const client::StackConfig& config,
                                                      const std::string& device, uint64_t memory,
                                                      const std::vector<int64_t>& seqs) {
  const absl::StatusOr<Offline> offline = Prepare(config, device);
  if (!offline.ok()) return offline.status();
  const absl::StatusOr<std::vector<CapacityRow>> rows =
      PlanCapacity(offline->config, *offline->sizes, memory, seqs);
  if (!rows.ok()) return rows.status();
  std::vector<Capacity> result;
  for (const CapacityRow& row : *rows) {
    result.push_back({.seq = row.seq,
                      .batch_from = row.batch_from,
                      .batch_to = row.batch_to,
                      .flags = row.flags,
                      .bytes = row.bytes});
  }
  return result;
}

int64_t LargestBatch() { return lamina::StackConfig::kMaxBatchSize; }

}  // namespace lamina::cli
