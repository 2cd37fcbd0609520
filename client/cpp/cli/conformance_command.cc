// lamina conformance: whether a live daemon keeps the contract.
#include <csignal>
#include <cstdio>
#include <fstream>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "cli/commands.h"
#include "cli/conformance/checks.h"
#include "cli/conformance/daemon.h"
#include "nlohmann/json.hpp"
#include "src/channel.h"

namespace lamina::cli {
namespace {

using conformance::Check;
using conformance::Daemon;
using conformance::Group;
using conformance::Outcome;
using conformance::Result;

volatile std::sig_atomic_t interrupted = 0;

// A first signal lets the running check end and clean up; a second one ends the program.
void CatchSignals() {
  struct sigaction action {};
  action.sa_handler = [](int) { interrupted = 1; };
  action.sa_flags = SA_RESETHAND | SA_RESTART;
  sigaction(SIGINT, &action, nullptr);
  sigaction(SIGTERM, &action, nullptr);
}

std::string Padded(const std::string& name, size_t width) {
  return name + std::string(width - std::min(width, name.size()), ' ');
}

size_t Widest(const std::vector<const Check*>& checks) {
  size_t widest = 0;
  for (const Check* check : checks) widest = std::max(widest, check->name.size());
  return widest;
}

int List(const GlobalOptions& options, const std::vector<Group>& groups,
         const std::vector<const Check*>& checks) {
  nlohmann::json list = nlohmann::json::array();
  std::string text;
  for (const Group& group : groups) {
    bool named = false;
    for (const Check* check : checks) {
      if (check < group.checks.data() || check >= group.checks.data() + group.checks.size())
        continue;
      list.push_back({{"name", check->name}, {"rule", check->rule}});
      if (!named) absl::StrAppend(&text, text.empty() ? "" : "\n", group.title, "\n");
      named = true;
      absl::StrAppend(&text, "  ", Padded(check->name, Widest(checks)), "  ", check->rule, "\n");
    }
  }
  if (options.json) {
    PrintJson(list);
  } else {
    PrintText(absl::StrCat(text, checks.size(), " checks"));
  }
  return kOk;
}

std::string Line(const Result& result, size_t width) {
  char seconds[32];
  std::snprintf(seconds, sizeof(seconds), "%6.2f s", result.seconds);
  const std::string name = Padded(result.check->name, width);
  switch (result.outcome) {
    case Outcome::kPassed:
      return absl::StrCat("ok    ", name, seconds);
    case Outcome::kSkipped:
      return absl::StrCat("skip  ", name, "          ", result.detail);
    case Outcome::kFailed:
      break;
  }
  return absl::StrCat(
      "FAIL  ", name, seconds, "\n      rule: ", result.check->rule,
      "\n      seen: ", absl::StrReplaceAll(result.detail, {{"\n", "\n            "}}));
}

nlohmann::json ResultJson(const Result& result) {
  nlohmann::json json = {{"name", result.check->name},
                         {"rule", result.check->rule},
                         {"outcome", conformance::Name(result.outcome)},
                         {"seconds", result.seconds}};
  if (!result.detail.empty()) json["detail"] = result.detail;
  return json;
}

int RunAgainst(const GlobalOptions& options, const ConformanceOptions& conformance,
               const std::string& target, const std::vector<const Check*>& checks) {
  // The client of WithClient was made with the same, so this can be made, too.
  const auto open = [&](const grpc::ChannelArguments& arguments) {
    return client::internal::OpenChannel(target, options.security, arguments).value();
  };
  Daemon daemon({.target = target,
                 .timeout_seconds = options.timeout_seconds,
                 .open = open,
                 .slow = conformance.slow});
  if (const grpc::Status status = daemon.Connect(); !status.ok()) {
    return Fail(options, absl::Status(static_cast<absl::StatusCode>(status.error_code()),
                                      status.error_message()));
  }
  const auto& info = daemon.info();
  if (!options.json) {
    PrintText(absl::StrCat("laminad ", info.version(), " at ", target, ": ", info.backend(), ", ",
                           info.device_name()));
  }
  CatchSignals();
  const size_t width = Widest(checks);
  nlohmann::json results = nlohmann::json::array();
  bool failed_now = false;
  const conformance::Tally tally = conformance::RunChecks(
      checks, daemon,
      [&](const Result& result) {
        failed_now = result.outcome == Outcome::kFailed;
        results.push_back(ResultJson(result));
        if (options.json) return;
        PrintText(Line(result, width));
        std::fflush(stdout);
      },
      [&]() -> std::string {
        if (interrupted != 0) return "interrupted";
        if (!failed_now) return "";
        const grpc::Status status = daemon.Call(conformance::v1::GetServerInfoRequest()).status;
        return status.ok()
                   ? ""
                   : absl::StrCat("the daemon no longer answers: ", conformance::Describe(status));
      });
  daemon.CleanUp();

  nlohmann::json json = {
      {"target", target},          {"version", info.version()},    {"commit", info.build_commit()},
      {"backend", info.backend()}, {"device", info.device_name()}, {"passed", tally.passed},
      {"failed", tally.failed},    {"skipped", tally.skipped},     {"checks", std::move(results)},
      {"calls", daemon.Counts()}};
  bool written = true;
  if (!conformance.json_file.empty()) {
    std::ofstream file(conformance.json_file);
    file << json.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) << "\n";
    file.close();
    written = !file.fail();
  }
  if (options.json) {
    PrintJson(json);
  } else {
    PrintText(tally.Text());
  }
  if (!written)
    return Fail(options, absl::InternalError(absl::StrCat(conformance.json_file,
                                                          ": the results can't be written")));
  return tally.failed == 0 && interrupted == 0 ? kOk : kRefused;
}

}  // namespace

int Conformance(const GlobalOptions& options, const ConformanceOptions& conformance) {
  const std::vector<Group> groups = conformance::AllChecks();
  std::string unmatched;
  const std::vector<const Check*> checks =
      conformance::Select(groups, conformance.only, &unmatched);
  if (checks.empty()) {
    return FailUsage(options, absl::StrCat("--only ", unmatched, ": names no check; see --list"));
  }
  if (conformance.list) return List(options, groups, checks);
  return WithClient(options, [&](const client::Client& daemon) {
    return RunAgainst(options, conformance, daemon.target(), checks);
  });
}

}  // namespace lamina::cli
