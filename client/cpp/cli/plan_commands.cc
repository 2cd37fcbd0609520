// lamina plan: by the daemon, or here.
#include <algorithm>
#include <map>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "cli/commands.h"
#include "cli/config_flags.h"
#include "cli/config_json.h"
#include "cli/describe.h"
#include "cli/offline_plan.h"
#include "nlohmann/json.hpp"

namespace lamina::cli {
namespace {

using Json = nlohmann::json;

int PrintPlanOffline(const GlobalOptions& options, const PlanOptions& plan,
                     const client::StackConfig& config) {
  const absl::StatusOr<client::MemoryPlan> result = PlanOffline(config, plan.device);
  if (!result.ok()) return FailBy(options, result.status());
  if (options.json) {
    Json json = ToJson(*result);
    json["device"] = plan.device;
    PrintJson(json);
  } else {
    PrintText(PlanText(*result));
  }
  return kOk;
}

int PrintPlanOfDaemon(const GlobalOptions& options, const client::StackConfig& config) {
  return WithClient(options, [&](const client::Client& daemon) {
    const absl::StatusOr<client::PlanResult> result = daemon.PlanMemory(config);
    if (!result.ok()) return Fail(options, result.status());
    if (options.json) {
      PrintJson(ToJson(*result));
    } else {
      PrintText(absl::StrCat(PlanText(result->plan), "\n", result->fits ? "fits" : "does not fit",
                             ": ", HumanBytes(result->device_free_bytes), " free on the device"));
    }
    return static_cast<int>(kOk);
  });
}

std::string Range(int64_t from, int64_t to) {
  return from == to ? absl::StrCat(from) : absl::StrCat(from, "-", to);
}

// The rows as a table, each length's ending with what is too much.
std::string CapacityText(const std::vector<Capacity>& rows,
                         const std::map<int64_t, int64_t>& largest) {
  Table table({"SEQ", "MICRO-BATCH", "SIZE", "BYTES", "FLAGS"}, /*text_last=*/true);
  for (const auto& [seq, most] : largest) {
    for (const Capacity& row : rows) {
      if (row.seq != seq) continue;
      table.Add({std::to_string(seq), Range(row.batch_from, row.batch_to), HumanBytes(row.bytes),
                 HumanCount(static_cast<int64_t>(row.bytes)),
                 row.flags.empty() ? "none" : absl::StrJoin(row.flags, ", ")});
    }
    if (most < LargestBatch()) {
      table.Add({std::to_string(seq), absl::StrCat(most + 1, "-"), "", "", "out of memory"});
    }
  }
  return table.Text();
}

std::string CapacityCsv(const std::vector<Capacity>& rows) {
  std::string text = "seq,micro_batch_from,micro_batch_to,flags,bytes";
  for (const Capacity& row : rows) {
    absl::StrAppend(&text, "\n", row.seq, ",", row.batch_from, ",", row.batch_to, ",",
                    absl::StrJoin(row.flags, "+"), ",", row.bytes);
  }
  return text;
}

Json CapacityJson(const PlanOptions& plan, const client::StackConfig& config,
                  const std::vector<Capacity>& rows, const std::map<int64_t, int64_t>& largest) {
  Json json = {{"model", plan.model.empty() ? Json() : Json(plan.model)},
               {"memory_bytes", *plan.memory},
               {"device", plan.device},
               {"rows", Json::array()},
               {"max_micro_batch", Json::object()}};
  const Json fields = ToJson(config);
  for (const char* key : {"hidden_size", "intermediate_size", "heads", "num_hidden_layers", "dtype",
                          "pre_layer_norm", "causal", "training", "stochastic_mode"}) {
    json["config"][key] = fields[key];
  }
  for (const Capacity& row : rows) {
    json["rows"].push_back({{"seq", row.seq},
                            {"micro_batch_from", row.batch_from},
                            {"micro_batch_to", row.batch_to},
                            {"flags", row.flags},
                            {"bytes", row.bytes}});
  }
  for (const auto& [seq, most] : largest) json["max_micro_batch"][std::to_string(seq)] = most;
  return json;
}

int PrintCapacity(const GlobalOptions& options, const PlanOptions& plan,
                  const client::StackConfig& config) {
  const absl::StatusOr<std::vector<Capacity>> rows =
      CapacityOffline(config, plan.device, *plan.memory, plan.seqs);
  if (!rows.ok()) return FailBy(options, rows.status());
  std::map<int64_t, int64_t> largest;
  for (const int64_t seq : plan.seqs) largest[seq] = 0;
  for (const Capacity& row : *rows) largest[row.seq] = std::max(largest[row.seq], row.batch_to);
  if (options.json) {
    PrintJson(CapacityJson(plan, config, *rows, largest));
  } else {
    PrintText(options.csv ? CapacityCsv(*rows) : CapacityText(*rows, largest));
  }
  return kOk;
}

}  // namespace

int Plan(const GlobalOptions& options, PlanOptions plan, const ConfigFlags& flags) {
  Json fields = Json::object();
  if (!plan.model.empty()) {
    absl::StatusOr<Json> model = ModelFields(plan.model);
    if (!model.ok()) return FailUsage(options, std::string(model.status().message()));
    fields = *std::move(model);
  }
  if (plan.memory) {
    const std::string pointless = flags.FirstGiven(
        {"batch_size", "max_seq_length", "max_contexts", "normalize_invertible", "gelu_checkpoint",
         "attn_dropout_checkpoint", "activation_checkpointing"});
    if (!pointless.empty()) {
      return FailUsage(options,
                       absl::StrCat("--", pointless, ": with --memory that is what is looked for"));
    }
    if (plan.device.empty()) plan.device = "cuda";
    fields["dtype"] = "bf16";
  } else if (!plan.seqs.empty()) {
    return FailUsage(options, "--seq needs --memory; a plan of one config takes --max-seq-length");
  } else if (options.csv) {
    return FailUsage(options, kCsvIsForCapacity);
  }
  if (plan.seqs.empty()) plan.seqs = {128, 512};
  const absl::StatusOr<client::StackConfig> config =
      plan.model.empty() && !plan.memory ? flags.Resolve() : flags.ResolveOver(fields);
  if (!config.ok()) return FailUsage(options, std::string(config.status().message()));
  if (plan.memory) return PrintCapacity(options, plan, *config);
  return plan.device.empty() ? PrintPlanOfDaemon(options, *config)
                             : PrintPlanOffline(options, plan, *config);
}

}  // namespace lamina::cli
