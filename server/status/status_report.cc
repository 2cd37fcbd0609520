#include "server/status/status_report.h"

#include <algorithm>
#include <map>
#include <utility>

#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "server/engine/device_peak.h"

namespace lamina {
namespace {

using Json = nlohmann::ordered_json;

Json ByKind(const std::vector<StackInfo>& stacks) {
  Json kinds = Json::object();
  for (int kind = 0; kind < kMemoryKinds; ++kind) {
    size_t bytes = 0;
    for (const StackInfo& stack : stacks) bytes += stack.plan.Bytes(static_cast<MemoryKind>(kind));
    kinds[Name(static_cast<MemoryKind>(kind))] = bytes;
  }
  return kinds;
}

Json DeviceJson(const StatusSources& sources, size_t free_bytes) {
  const DeviceInfo& device = sources.engine.device();
  Json peaks = Json::object();
  for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF16})
    peaks[Name(dtype)] = sources.metrics.peak_flops(ComputeTypeOf(dtype));
  return {{"backend", device.kind},    {"name", device.name},
          {"uuid", device.uuid},       {"ordinal", device.ordinal},
          {"threads", device.threads}, {"capacity_bytes", device.total_bytes},
          {"free_bytes", free_bytes},  {"peak_flops_per_second", std::move(peaks)}};
}

Json StackJson(const StackInfo& stack) {
  return {{"name", stack.name},
          {"config", Json::parse(ToJson(stack.config))},
          {"parameters", stack.parameter_count},
          {"planned_bytes", stack.plan.Total()},
          {"planned_by_kind", ByKind({stack})},
          {"arena_bytes", stack.plan.Bytes(MemoryKind::kActivations)},
          {"arena_used_bytes", stack.context_bytes_in_use},
          {"arena_high_water_bytes", stack.context_bytes_high_water},
          {"contexts", stack.outstanding_contexts},
          {"optimizer_step", stack.counters.optimizer_step},
          {"skipped_steps", stack.counters.skipped_steps},
          {"loss_scale", stack.loss_scale}};
}

// Those that hold the most first.
Json SessionsJson(const StatusSources& sources) {
  const std::map<SessionKey, ContextUse> uses = sources.engine.ContextUses();
  struct Holder {
    SessionManager::View view;
    ContextUse use;
    size_t bytes() const { return view.region_bytes + use.bytes; }
  };
  std::vector<Holder> holders;
  for (SessionManager::View& view : sources.sessions.List()) {
    const auto use = uses.find(view.key);
    holders.push_back({std::move(view), use == uses.end() ? ContextUse{} : use->second});
  }
  std::stable_sort(holders.begin(), holders.end(),
                   [](const Holder& a, const Holder& b) { return a.bytes() > b.bytes(); });
  Json list = Json::array();
  for (const Holder& holder : holders) {
    if (list.size() == kReportedSessions) break;
    const SessionManager::View& view = holder.view;
    list.push_back({{"session", view.key},
                    {"client", view.client_name},
                    {"state", view.adrift ? "adrift"
                              : view.kept ? "kept"
                                          : "leased"},
                    {"age_seconds", absl::ToDoubleSeconds(view.age)},
                    {"expires_in_seconds", absl::ToDoubleSeconds(view.expires_in)},
                    {"regions", view.regions},
                    {"region_bytes", view.region_bytes},
                    {"contexts", holder.use.contexts},
                    {"activation_bytes", holder.use.bytes}});
  }
  return {{"live", holders.size()}, {"list", std::move(list)}};
}

Json StepJson(const StepRecord& step) {
  return {{"number", step.number},
          {"ended", step.ended},
          {"direction", Name(step.direction)},
          {"stack", step.stack.data()},
          {"session", step.session},
          {"queue_seconds", step.queue},
          {"input_seconds", step.input},
          {"compute_seconds", step.compute},
          {"output_seconds", step.output},
          {"total_seconds", step.total},
          {"samples", step.samples},
          {"tokens", step.tokens},
          {"padding_tokens", step.padding_tokens},
          {"flops_per_second", step.compute > 0 ? step.flops / step.compute : 0.0},
          {"request_id", RequestIdOf(step)},
          {"trace_id", step.trace_id.data()}};
}

// {direction: [[second, steps, samples, tokens, mean seconds a step], ...]}; seconds in which
// nothing ended are left out.
Json HistoryJson(const StepLog& log, int64_t now) {
  Json history = Json::object();
  for (size_t d = 0; d < kStepDirections; ++d)
    history[Name(static_cast<StepDirection>(d))] = Json::array();
  for (const StepSecond& second : log.Seconds(now))
    for (size_t d = 0; d < kStepDirections; ++d) {
      const StepSecond::Sum& sum = second.sums[d];
      if (sum.steps > 0)
        history[Name(static_cast<StepDirection>(d))].push_back(
            {second.second, sum.steps, sum.samples, sum.tokens, sum.seconds / sum.steps});
    }
  return history;
}

}  // namespace

bool Readiness::ready() const { return absl::string_view(state) == "serving"; }
bool Readiness::alive() const { return absl::string_view(state) != "failed"; }

Readiness ReadinessOf(const StatusSources& sources) {
  if (const absl::Status health = sources.engine.health(); !health.ok())
    return {"failed", absl::StrCat("the device failed: ", health.message())};
  switch (sources.phase.load(std::memory_order_acquire)) {
    case Phase::kStarting:
      return {"starting", ""};
    case Phase::kServing:
      return {"serving", ""};
    case Phase::kDraining:
      return {"draining", "the daemon was asked to stop"};
  }
  return {};
}

nlohmann::ordered_json StatusReport(const StatusSources& sources) {
  const Readiness readiness = ReadinessOf(sources);
  const absl::Time now = absl::Now();
  const std::vector<StackInfo> stacks = sources.engine.ListStacks();
  const size_t free_bytes = sources.engine.device_free_bytes();
  Json stack_list = Json::array(), steps = Json::array();
  size_t planned = 0;
  for (const StackInfo& stack : stacks) {
    planned += stack.plan.Total();
    stack_list.push_back(StackJson(stack));
  }
  for (const StepRecord& step : sources.metrics.steps().Last(kReportedSteps))
    steps.push_back(StepJson(step));
  const double last_checkpoint = sources.metrics.last_checkpoint();
  Json report = {{"version", sources.version},
                 {"commit", sources.commit},
                 {"state", readiness.state},
                 {"reason", readiness.reason},
                 {"now", absl::ToDoubleSeconds(now - absl::UnixEpoch())},
                 {"uptime_seconds", absl::ToDoubleSeconds(now - sources.started)},
                 {"listen", sources.phase.load(std::memory_order_acquire) == Phase::kStarting
                                ? std::vector<std::string>()
                                : sources.listen},
                 {"broker", sources.broker},
                 {"device", DeviceJson(sources, free_bytes)}};
  report["memory"] = {{"planned_bytes", planned}, {"planned_by_kind", ByKind(stacks)}};
  report["queue"] = {{"depth", sources.metrics.queue_depth()},
                     {"capacity", sources.engine.options().queue_capacity}};
  report["checkpoints"] = {{"enabled", !sources.engine.options().checkpoint_dir.empty()},
                           {"last_success", last_checkpoint}};
  report["stacks"] = std::move(stack_list);
  report["sessions"] = SessionsJson(sources);
  report["steps"] = {{"total", sources.metrics.steps().total()}, {"last", std::move(steps)}};
  report["history"] = HistoryJson(sources.metrics.steps(), absl::ToUnixSeconds(now));
  return report;
}

}  // namespace lamina
