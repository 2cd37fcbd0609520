// The harness of `lamina conformance`: what it selects, how it counts, and that nothing which goes
// wrong in a check is taken for a pass. tests/cli/test_conformance.py runs the checks themselves.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <set>
#include <stdexcept>

#include "cli/conformance/checks.h"
#include "cli/conformance/daemon.h"
#include "cli/conformance/harness.h"

namespace lamina::conformance {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

void Passes(Daemon&) {}

std::vector<Group> TwoGroups() {
  return {{"a", "First", {{"a.one", "Rule 1", Passes}, {"a.two", "Rule 2", Passes}}},
          {"b", "Second", {{"b.one", "Rule 3", Passes}, {"b.one-more", "Rule 4", Passes}}}};
}

std::vector<std::string> Selected(const std::vector<std::string>& globs, std::string* unmatched) {
  const std::vector<Group> groups = TwoGroups();
  std::vector<std::string> names;
  for (const Check* check : Select(groups, globs, unmatched)) names.push_back(check->name);
  return names;
}

TEST(ConformanceSelect, NamesGlobsAndGroups) {
  std::string unmatched;
  EXPECT_THAT(Selected({}, &unmatched), ElementsAre("a.one", "a.two", "b.one", "b.one-more"));
  EXPECT_THAT(Selected({"*.one"}, &unmatched), ElementsAre("a.one", "b.one"));
  EXPECT_THAT(Selected({"b", "a.two"}, &unmatched), ElementsAre("a.two", "b.one", "b.one-more"));
  EXPECT_THAT(Selected({"b.*", "b.one"}, &unmatched), ElementsAre("b.one", "b.one-more"));
  EXPECT_EQ(unmatched, "");
}

TEST(ConformanceSelect, AGlobThatNamesNothingIsToldNotIgnored) {
  std::string unmatched;
  EXPECT_THAT(Selected({"a.*", "c.*"}, &unmatched), IsEmpty());
  EXPECT_EQ(unmatched, "c.*");
}

struct Ran {
  Tally tally;
  std::vector<std::string> outcomes, details;
};

// Runs checks against no daemon: nothing listens at its target.
Ran RunAll(
    const std::vector<std::function<void(Daemon&)>>& bodies,
    const std::function<std::string()>& stop = [] { return ""; }) {
  std::vector<Check> checks;
  for (const auto& body : bodies) checks.push_back({"x.y", "A rule", body});
  std::vector<const Check*> selected;
  for (const Check& check : checks) selected.push_back(&check);
  Daemon daemon({.target = "unix:/nowhere/at/all", .timeout_seconds = 2});
  Ran ran;
  ran.tally = RunChecks(
      selected, daemon,
      [&](const Result& result) {
        ran.outcomes.push_back(Name(result.outcome));
        ran.details.push_back(result.detail);
      },
      stop);
  return ran;
}

TEST(ConformanceRun, CountsEachOutcome) {
  const Ran ran = RunAll({Passes, [](Daemon&) { Fail("saw ", 2, ", not ", 3); },
                          [](Daemon&) { Skip("no ", "way"); },
                          [](Daemon&) { throw std::runtime_error("broken"); }, Passes});
  EXPECT_THAT(ran.outcomes, ElementsAre("passed", "failed", "skipped", "failed", "passed"));
  EXPECT_THAT(ran.details, ElementsAre("", "saw 2, not 3", "no way", HasSubstr("broken"), ""));
  EXPECT_EQ(ran.tally.Text(), "2 passed, 2 failed, 1 skipped");
}

TEST(ConformanceRun, SkipsAreCountedOnlyWhereThereAreSome) {
  EXPECT_EQ(RunAll({Passes}).tally.Text(), "1 passed, 0 failed");
}

TEST(ConformanceRun, AfterAReasonToStopTheRestIsSkippedWithIt) {
  int asked = 0;
  const Ran ran = RunAll({Passes, Passes, Passes},
                         [&asked] { return ++asked == 2 ? std::string("interrupted") : ""; });
  EXPECT_THAT(ran.outcomes, ElementsAre("passed", "passed", "skipped"));
  EXPECT_EQ(ran.details.back(), "interrupted");
}

TEST(ConformanceCases, GoOnAfterAViolationAndNameEach) {
  Cases cases;
  int tried = 0;
  for (const char* label : {"first", "second", "third"}) {
    cases.Try(label, [&] { Require(++tried == 2, "number ", tried); });
  }
  EXPECT_EQ(tried, 3);
  try {
    cases.Done();
    FAIL() << "no violation";
  } catch (const Violation& violation) {
    EXPECT_EQ(violation.what, "first: number 1\nthird: number 3");
  }
}

TEST(ConformanceCases, DoNotHideASkip) {
  Cases cases;
  EXPECT_THROW(cases.Try("first", [] { Skip("no way"); }), Skipped);
}

TEST(ConformanceDaemon, AnAnswerThatIsNotTheOneIsAViolation) {
  const grpc::Status refused(Code::NOT_FOUND, "stack: none of that name");
  EXPECT_NO_THROW(Daemon::Refused("GetStack", refused, Code::NOT_FOUND, {"stack", "none"}));
  EXPECT_THROW(Daemon::Refused("GetStack", refused, Code::NOT_FOUND, {"session"}), Violation);
  EXPECT_THROW(Daemon::Refused("GetStack", refused, Code::INTERNAL), Violation);
  EXPECT_THROW(Daemon::Refused("GetStack", grpc::Status::OK, Code::NOT_FOUND), Violation);
}

TEST(ConformanceDaemon, AnIdInAMessageIsAViolationOfAnyCall) {
  Daemon daemon({.target = "unix:/nowhere/at/all"});
  daemon.Remember("0123abcd");
  EXPECT_NO_THROW(daemon.Count("s", "M", grpc::Status(Code::INTERNAL, "4567")));
  EXPECT_THROW(daemon.Count("s", "M", grpc::Status(Code::INTERNAL, "session 0123abcd is gone")),
               Violation);
  EXPECT_EQ(daemon.Counts()["s.M"]["INTERNAL"], 2);
}

TEST(ConformanceDaemon, NoDaemonFailsEveryCheckThatCalls) {
  const Ran ran = RunAll({[](Daemon& daemon) { daemon.Ok(v1::GetServerInfoRequest()); }});
  EXPECT_THAT(ran.outcomes, ElementsAre("failed"));
  EXPECT_THAT(ran.details.front(), HasSubstr("GetServerInfo"));
}

TEST(ConformanceChecks, HaveNamesOfTheirGroupsAndRules) {
  std::set<std::string> names;
  for (const Group& group : AllChecks()) {
    EXPECT_FALSE(group.title.empty()) << group.name;
    for (const Check& check : group.checks) {
      EXPECT_TRUE(names.insert(check.name).second) << check.name << " is there twice";
      EXPECT_EQ(check.name.rfind(group.name + ".", 0), 0u) << check.name;
      EXPECT_FALSE(check.rule.empty()) << check.name;
      EXPECT_EQ(check.rule.find('\n'), std::string::npos) << check.name;
    }
  }
}

}  // namespace
}  // namespace lamina::conformance
