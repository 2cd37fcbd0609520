#include "cli/describe.h"

#include <cstdio>
#include <vector>

#include "absl/strings/str_cat.h"
#include "cli/config_json.h"
#include "cli/output.h"
#include "nlohmann/json.hpp"

namespace lamina::cli {
namespace {

using client::MemoryKind;
using Json = nlohmann::json;

constexpr MemoryKind kKinds[] = {MemoryKind::kWeights,     MemoryKind::kMasterWeights,
                                 MemoryKind::kGradients,   MemoryKind::kOptimizer,
                                 MemoryKind::kActivations, MemoryKind::kWorkspace,
                                 MemoryKind::kStaging,     MemoryKind::kGraphs};

std::string Ratio(double value) {
  char text[32];
  std::snprintf(text, sizeof(text), "%g", value);
  return text;
}

// The memory flags and stochastic_mode that are on.
std::string FlagsText(const client::StackConfig& config) {
  std::string text;
  const auto add = [&text](bool on, const char* name) {
    if (on) absl::StrAppend(&text, text.empty() ? "" : ", ", name);
  };
  add(config.normalize_invertible, "normalize_invertible");
  add(config.gelu_checkpoint, "gelu_checkpoint");
  add(config.attn_dropout_checkpoint, "attn_dropout_checkpoint");
  add(config.activation_checkpointing, "activation_checkpointing");
  add(config.stochastic_mode, "stochastic_mode");
  return text.empty() ? "none" : text;
}

}  // namespace

Json ToJson(const client::MemoryPlan& plan) {
  Json by_kind = Json::object();
  for (const MemoryKind kind : kKinds) by_kind[client::Name(kind)] = plan.Bytes(kind);
  Json entries = Json::array();
  for (const client::MemoryPlanEntry& entry : plan.entries) {
    entries.push_back({{"kind", client::Name(entry.kind)},
                       {"name", entry.name},
                       {"bytes", entry.bytes},
                       {"instances", entry.instances}});
  }
  return {{"total_bytes", plan.total_bytes},
          {"context_bytes", plan.context_bytes},
          {"by_kind", std::move(by_kind)},
          {"entries", std::move(entries)}};
}

Json ToJson(const client::PlanResult& result) {
  Json json = ToJson(result.plan);
  json["device_free_bytes"] = result.device_free_bytes;
  json["fits"] = result.fits;
  return json;
}

Json ToJson(const client::ServerInfo& info) {
  Json transports = Json::array();
  for (const client::Transport transport : info.transports) {
    transports.push_back(client::Name(transport));
  }
  return {{"version", info.version},
          {"build_commit", info.build_commit},
          {"backend", info.backend},
          {"device_name", info.device_name},
          {"device_uuid", info.device_uuid},
          {"device_ordinal", info.device_ordinal},
          {"device_total_bytes", info.device_total_bytes},
          {"device_free_bytes", info.device_free_bytes},
          {"inline_cap_bytes", info.inline_cap_bytes},
          {"replay_window", info.replay_window},
          {"transports", std::move(transports)},
          {"uptime_seconds", info.uptime_seconds},
          {"checkpoints_enabled", info.checkpoints_enabled},
          {"metrics_address", info.metrics_address}};
}

Json ToJson(const client::StackInfo& info) {
  Json json = {{"name", info.name},
               {"config", ToJson(info.config)},
               {"plan", ToJson(info.plan)},
               {"parameter_count", info.parameter_count},
               {"step", info.step},
               {"skipped_steps", info.skipped_steps},
               {"forward_count", info.forward_count},
               {"outstanding_contexts", info.outstanding_contexts},
               {"loss_scale", info.loss_scale}};
  return json;
}

Json ToJson(const client::StepTiming& timing) {
  return {{"queue_seconds", timing.queue_seconds},
          {"input_seconds", timing.input_seconds},
          {"compute_seconds", timing.compute_seconds},
          {"output_seconds", timing.output_seconds}};
}

std::string PlanText(const client::MemoryPlan& plan) {
  Table kinds({"KIND", "SIZE", "BYTES"});
  for (const MemoryKind kind : kKinds) {
    const uint64_t bytes = plan.Bytes(kind);
    kinds.Add({client::Name(kind), HumanBytes(bytes), HumanCount(static_cast<int64_t>(bytes))});
  }
  kinds.Add(
      {"total", HumanBytes(plan.total_bytes), HumanCount(static_cast<int64_t>(plan.total_bytes))});
  Table buffers({"BUFFER", "KIND", "INSTANCES", "SIZE", "BYTES"});
  for (const client::MemoryPlanEntry& entry : plan.entries) {
    buffers.Add({entry.name, client::Name(entry.kind), HumanCount(entry.instances),
                 HumanBytes(entry.bytes), HumanCount(static_cast<int64_t>(entry.bytes))});
  }
  return absl::StrCat(kinds.Text(), "\n\n", buffers.Text(),
                      "\n\none context at full size: ", HumanBytes(plan.context_bytes), " (",
                      HumanCount(static_cast<int64_t>(plan.context_bytes)), " bytes)");
}

std::string StackText(const client::StackInfo& info) {
  const client::StackConfig& config = info.config;
  std::vector<std::pair<std::string, std::string>> lines = {
      {"name", info.name},
      {"layers", absl::StrCat(config.num_hidden_layers, " x (H ", config.hidden_size, ", I ",
                              config.intermediate_size, ", ", config.heads, " heads), ",
                              config.pre_layer_norm ? "Pre-LN" : "Post-LN", ", GELU ",
                              client::Name(config.gelu), ", ", client::Name(config.dtype),
                              config.causal ? ", causal" : "")},
      {"limits", absl::StrCat("B ", config.batch_size, ", S ", config.max_seq_length, ", ",
                              config.max_contexts, " contexts")},
      {"dropout", absl::StrCat("attention ", Ratio(config.attn_dropout_ratio), ", hidden ",
                               Ratio(config.hidden_dropout_ratio))},
      {"training", config.training ? "on" : "off"},
      {"flags", FlagsText(config)},
      {"loss scale",
       absl::StrCat(Ratio(info.loss_scale), config.dynamic_loss_scale ? ", dynamic" : "")},
      {"seed", std::to_string(config.seed)},
      {"parameters", HumanCount(info.parameter_count)},
      {"memory", absl::StrCat(HumanBytes(info.plan.total_bytes), " (",
                              HumanCount(static_cast<int64_t>(info.plan.total_bytes)), " bytes)")},
      {"steps", absl::StrCat(HumanCount(info.step), " applied, ", HumanCount(info.skipped_steps),
                             " skipped")},
      {"forwards",
       absl::StrCat(HumanCount(static_cast<int64_t>(info.forward_count)), " in training, ",
                    info.outstanding_contexts, " contexts outstanding")}};
  return Lines(lines);
}

std::string TimingText(const client::StepTiming& timing) {
  return absl::StrCat("queue ", HumanSeconds(timing.queue_seconds), ", input ",
                      HumanSeconds(timing.input_seconds), ", compute ",
                      HumanSeconds(timing.compute_seconds), ", output ",
                      HumanSeconds(timing.output_seconds));
}

}  // namespace lamina::cli
