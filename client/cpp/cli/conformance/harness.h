// Checks, and how they are chosen, run and counted.
//
// A check states a rule of the contract and looks whether the daemon keeps it: it returns where it
// does, throws a Violation where it doesn't, and Skipped where this daemon offers no way to see.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"

namespace lamina::conformance {

class Daemon;

// The daemon broke the rule.
struct Violation {
  std::string what;  // what was seen, and what should have been
};

// The rule can't be seen on this daemon.
struct Skipped {
  std::string why;
};

template <class... Parts>
[[noreturn]] void Fail(const Parts&... parts) {
  throw Violation{absl::StrCat(parts...)};
}

template <class... Parts>
void Require(bool holds, const Parts&... parts) {
  if (!holds) Fail(parts...);
}

template <class... Parts>
[[noreturn]] void Skip(const Parts&... parts) {
  throw Skipped{absl::StrCat(parts...)};
}

// Several cases of one rule: all are tried, and Done throws one Violation that names those that
// failed.
class Cases {
 public:
  template <class Run>
  void Try(const std::string& label, Run run) {
    try {
      run();
    } catch (const Violation& violation) {
      failures_.push_back(absl::StrCat(label, ": ", violation.what));
    }
  }
  void Done() const;

 private:
  std::vector<std::string> failures_;
};

struct Check {
  std::string name;  // "group.what-it-looks-at"
  std::string rule;  // what the daemon must do, in one sentence
  std::function<void(Daemon&)> run;
};

struct Group {
  std::string name;   // what its checks' names begin with
  std::string title;  // what they are about
  std::vector<Check> checks;
};

// The checks that one of the globs names, in their order; all where there is no glob. A group's
// name stands for all of its checks. Empty where a glob names none: `unmatched` says which.
std::vector<const Check*> Select(const std::vector<Group>& groups,
                                 const std::vector<std::string>& globs, std::string* unmatched);

enum class Outcome { kPassed, kFailed, kSkipped };
const char* Name(Outcome outcome);  // "passed", "failed", "skipped"

struct Result {
  const Check* check = nullptr;
  Outcome outcome = Outcome::kPassed;
  std::string detail;  // of a failure what was seen, of a skip why
  double seconds = 0;
};

struct Tally {
  int64_t passed = 0, failed = 0, skipped = 0;
  void Add(Outcome outcome);
  // "N passed, N failed", and ", N skipped" where there are some.
  std::string Text() const;
};

// Runs the checks one after another and tells of each when it is done. Whatever a check throws that
// is no Skipped is a failure. After each, `stop` is asked: once it gives a reason, the rest is
// skipped with it.
Tally RunChecks(const std::vector<const Check*>& checks, Daemon& daemon,
                const std::function<void(const Result&)>& done,
                const std::function<std::string()>& stop);

}  // namespace lamina::conformance
