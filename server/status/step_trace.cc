#include "server/status/step_trace.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <system_error>
#include <utility>

#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"

namespace lamina {
namespace {

using Json = nlohmann::ordered_json;

constexpr int kDeviceRow = 1, kQueueRow = 2;

Json Meta(const char* what, int row, const std::string& name) {
  return {{"ph", "M"}, {"pid", 1}, {"tid", row}, {"name", what}, {"args", {{"name", name}}}};
}

Json Slice(const std::string& name, const char* category, double begin, double end) {
  return {{"ph", "X"},   {"pid", 1},        {"tid", kDeviceRow}, {"name", name},
          {"ts", begin}, {"cat", category}, {"dur", end - begin}};
}

Json Arguments(const StepRecord& step) {
  Json arguments = {{"step", step.number},     {"stack", step.stack.data()},
                    {"session", step.session}, {"samples", step.samples},
                    {"tokens", step.tokens},   {"padding_tokens", step.padding_tokens}};
  if (step.compute > 0 && step.flops > 0) arguments["flops_per_second"] = step.flops / step.compute;
  if (step.request_id[0] != '\0') arguments["request_id"] = RequestIdOf(step);
  if (step.trace_id[0] != '\0') arguments["trace_id"] = step.trace_id.data();
  return arguments;
}

}  // namespace

std::string StepTrace(const std::vector<StepRecord>& steps, const std::string& title) {
  Json events =
      Json::array({Meta("process_name", 0, title), Meta("thread_name", kDeviceRow, "device"),
                   Meta("thread_name", kQueueRow, "queue")});
  double start = 0;  // Unix seconds of the first event
  for (const StepRecord& step : steps) {
    const double admitted = step.ended - step.total;
    if (start == 0 || admitted < start) start = admitted;
  }
  const auto at = [start](double unix_seconds) { return (unix_seconds - start) * 1e6; };
  double before = 0;  // the end of the step before: the device runs one at a time
  for (const StepRecord& step : steps) {
    const double end = std::max(before, at(step.ended));
    const double begin = std::clamp(at(step.ended - step.total + step.queue), before, end);
    Json slice = Slice(Name(step.direction), "step", begin, end);
    slice["args"] = Arguments(step);
    events.push_back(std::move(slice));
    // What is left of the slice at its beginning is the host's: checks, launches.
    double phase = std::max(begin, end - 1e6 * (step.input + step.compute + step.output));
    for (const auto& [name, seconds] :
         {std::pair("input", step.input), {"compute", step.compute}, {"output", step.output}}) {
      const double until = std::min(end, phase + 1e6 * seconds);
      if (seconds > 0) events.push_back(Slice(name, "phase", phase, until));
      phase = until;
    }
    if (step.queue > 0) {
      Json wait = {{"ph", "b"},
                   {"pid", 1},
                   {"tid", kQueueRow},
                   {"name", "queue"},
                   {"ts", at(step.ended - step.total)},
                   {"cat", "queue"},
                   {"id", step.number},
                   {"args", {{"step", step.number}, {"direction", Name(step.direction)}}}};
      Json over = wait;
      over["ph"] = "e";
      over["ts"] = at(step.ended - step.total + step.queue);
      over.erase("args");
      events.push_back(std::move(wait));
      events.push_back(std::move(over));
    }
    before = end;
  }
  const Json trace = {{"displayTimeUnit", "ms"},
                      {"otherData", {{"title", title}, {"began_unix_seconds", start}}},
                      {"traceEvents", std::move(events)}};
  return trace.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

std::string FolderOfProfile(const std::string& path) {
  std::error_code error;
  if (std::filesystem::is_directory(path, error)) return path;
  const std::string parent = std::filesystem::path(path).parent_path().string();
  return parent.empty() ? "." : parent;
}

absl::StatusOr<std::string> WriteStepTrace(const StepLog& log, const std::string& path,
                                           const std::string& title) {
  const std::vector<StepRecord> steps = log.Last(log.capacity());
  std::error_code error;
  std::string file = path;
  if (std::filesystem::is_directory(path, error))
    file = absl::StrCat(path, "/laminad-", getpid(), "-", steps.empty() ? 0 : steps.back().number,
                        ".json");
  const std::string text = StepTrace(steps, title);
  const std::string draft = absl::StrCat(file, ".", getpid(), ".tmp");
  const auto failed = [&](const char* what) {
    const int reason = errno;
    std::remove(draft.c_str());
    return absl::UnavailableError(
        absl::StrCat("profile ", file, ": can't be ", what, ": ", std::strerror(reason)));
  };
  std::FILE* const out = std::fopen(draft.c_str(), "wb");
  if (out == nullptr) return failed("made");
  const bool written = std::fwrite(text.data(), 1, text.size(), out) == text.size();
  if (std::fclose(out) != 0 || !written) return failed("written");
  if (std::rename(draft.c_str(), file.c_str()) != 0) return failed("replaced");
  return file;
}

}  // namespace lamina
