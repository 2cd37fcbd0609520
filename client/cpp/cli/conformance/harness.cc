#include "cli/conformance/harness.h"

#include <fnmatch.h>

#include <chrono>
#include <exception>

#include "absl/strings/str_join.h"

namespace lamina::conformance {

void Cases::Done() const {
  if (!failures_.empty()) throw Violation{absl::StrJoin(failures_, "\n")};
}

std::vector<const Check*> Select(const std::vector<Group>& groups,
                                 const std::vector<std::string>& globs, std::string* unmatched) {
  std::vector<bool> used(globs.size(), false);
  std::vector<const Check*> selected;
  for (const Group& group : groups) {
    for (const Check& check : group.checks) {
      bool wanted = globs.empty();
      for (size_t i = 0; i < globs.size(); ++i) {
        if (globs[i] == group.name || fnmatch(globs[i].c_str(), check.name.c_str(), 0) == 0) {
          wanted = used[i] = true;
        }
      }
      if (wanted) selected.push_back(&check);
    }
  }
  for (size_t i = 0; i < globs.size(); ++i) {
    if (used[i]) continue;
    *unmatched = globs[i];
    return {};
  }
  return selected;
}

const char* Name(Outcome outcome) {
  switch (outcome) {
    case Outcome::kPassed:
      return "passed";
    case Outcome::kFailed:
      return "failed";
    case Outcome::kSkipped:
      break;
  }
  return "skipped";
}

void Tally::Add(Outcome outcome) {
  int64_t& count = outcome == Outcome::kPassed   ? passed
                   : outcome == Outcome::kFailed ? failed
                                                 : skipped;
  ++count;
}

std::string Tally::Text() const {
  return absl::StrCat(passed, " passed, ", failed, " failed",
                      skipped > 0 ? absl::StrCat(", ", skipped, " skipped") : "");
}

Tally RunChecks(const std::vector<const Check*>& checks, Daemon& daemon,
                const std::function<void(const Result&)>& done,
                const std::function<std::string()>& stop) {
  using Clock = std::chrono::steady_clock;
  Tally tally;
  std::string stopped;
  for (const Check* check : checks) {
    Result result{.check = check};
    if (!stopped.empty()) {
      result.outcome = Outcome::kSkipped;
      result.detail = stopped;
    } else {
      const Clock::time_point began = Clock::now();
      try {
        check->run(daemon);
      } catch (const Skipped& skipped) {
        result.outcome = Outcome::kSkipped;
        result.detail = skipped.why;
      } catch (const Violation& violation) {
        result.outcome = Outcome::kFailed;
        result.detail = violation.what;
      } catch (const std::exception& error) {
        result.outcome = Outcome::kFailed;
        result.detail = absl::StrCat("the check itself failed: ", error.what());
      }
      result.seconds = std::chrono::duration<double>(Clock::now() - began).count();
      stopped = stop();
    }
    tally.Add(result.outcome);
    done(result);
  }
  return tally;
}

}  // namespace lamina::conformance
