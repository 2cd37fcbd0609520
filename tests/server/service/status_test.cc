// The status report and the traces of steps, while a real server works.
#include <gtest/gtest.h>

#include <atomic>
#include <string>
#include <thread>
#include <vector>

#include <nlohmann/json.hpp>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "server/service/request_tag.h"
#include "server/status/status_pages.h"
#include "server/status/step_trace.h"
#include "service_rig.h"

namespace lamina::testing {
namespace {

StatusSources SourcesOf(Service& service, const std::atomic<Phase>& phase) {
  return {.engine = service.engine(),
          .sessions = service.sessions(),
          .metrics = service.state().metrics,
          .phase = phase,
          .version = "1",
          .started = absl::Now(),
          .listen = {service.address()}};
}

TEST(StatusPages, AreAskedWhileStepsRun) {
  Service service;
  Client client(service.address());
  client.Create();
  std::atomic<Phase> phase{Phase::kServing};
  const StatusSources sources = SourcesOf(service, phase);
  const auto pages = StatusPages(sources, "{}");
  std::atomic<bool> stop{false};
  std::thread asking([&] {
    while (!stop) {
      const auto report = nlohmann::json::parse(pages.at("/statusz.json")("").body);
      EXPECT_EQ(report.at("state"), "serving");
      EXPECT_EQ(report.at("stacks").at(0).at("name"), "s");
      EXPECT_EQ(pages.at("/readyz")("").code, 200);
      StepTrace(sources.metrics.steps().Last(100), "t");
    }
  });
  for (int i = 0; i < 30; ++i) {
    client.Back(client.Train(static_cast<uint64_t>(i)));
  }
  stop = true;
  asking.join();
  const auto report = nlohmann::json::parse(pages.at("/statusz")("format=json").body);
  EXPECT_EQ(report.at("steps").at("total"), 60);
  EXPECT_EQ(report.at("steps").at("last").size(), kReportedSteps);
  EXPECT_EQ(report.at("stacks").at(0).at("contexts"), 0);
  EXPECT_GT(report.at("stacks").at(0).at("arena_high_water_bytes"), 0);
}

TEST(StatusPages, WaitForNoStep) {
  Service service;
  Client(service.address()).Create();
  std::atomic<Phase> phase{Phase::kServing};
  const StatusSources sources = SourcesOf(service, phase);
  Blocker busy(service.engine());  // for as long as the pages are asked
  for (const auto& [path, page] : StatusPages(sources, "{}")) EXPECT_EQ(page("").code, 200) << path;
  EXPECT_FALSE(service.state().metrics.Text().empty());
}

TEST(StatusPages, TellReadinessFromLiveness) {
  Service service;
  std::atomic<Phase> phase{Phase::kStarting};
  const StatusSources sources = SourcesOf(service, phase);
  const auto pages = StatusPages(sources, "{}");
  const auto answer = [&](const char* path) {
    const HttpAnswer page = pages.at(path)("");
    return absl::StrCat(page.code, " ", page.body);
  };
  EXPECT_EQ(answer("/healthz"), "200 ok\n");
  EXPECT_EQ(answer("/readyz"), "503 starting\n");
  phase = Phase::kServing;
  EXPECT_EQ(answer("/readyz"), "200 ok\n");
  phase = Phase::kDraining;
  EXPECT_EQ(answer("/healthz"), "200 ok\n");
  EXPECT_EQ(answer("/readyz"), "503 draining: the daemon was asked to stop\n");
  phase = Phase::kServing;
  Client client(service.address());
  client.Create();
  service.backend().fail_op = 0;
  EXPECT_FALSE(client.Send(client.EvalRequest()).ok());
  EXPECT_TRUE(absl::StartsWith(answer("/healthz"), "503 the device failed: "))
      << answer("/healthz");
  EXPECT_TRUE(absl::StartsWith(answer("/readyz"), "503 failed: the device failed: "));
}

TEST(StatusPages, NamesCannotEndTheScript) {
  EXPECT_EQ(EmbeddedJson("{\"a\":\"</script>&\"}"), "{\"a\":\"\\u003c/script\\u003e\\u0026\"}");
  EXPECT_EQ(nlohmann::json::parse(EmbeddedJson("\"</script><!--&\"")), "</script><!--&");
}

// Times that don't fit together, as clocks that are set back give them.
TEST(StepTraces, StepsNeverOverlap) {
  std::vector<StepRecord> steps;
  for (uint64_t i = 1; i <= 4; ++i)
    steps.push_back({.number = i,
                     .ended = 1000.0 - 0.1 * static_cast<double>(i % 2),
                     .queue = 0.5,
                     .input = 0.1,
                     .compute = 9,
                     .output = 0.1,
                     .total = 2});
  const auto trace = nlohmann::json::parse(StepTrace(steps, "t"));
  double before = 0;
  for (const auto& event : trace.at("traceEvents")) {
    if (event.at("ph") != "X") continue;
    const double begin = event.at("ts"), length = event.at("dur");
    EXPECT_GE(begin, 0);
    EXPECT_GE(length, 0);
    if (event.at("cat") != "step") continue;
    EXPECT_GE(begin, before);
    before = begin + length;
  }
  EXPECT_EQ(nlohmann::json::parse(StepTrace({}, "none")).at("traceEvents").size(), 3u);
}

TEST(RequestTags, AreTakenWholeOrNotAtAll) {
  const std::string parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
  EXPECT_EQ(ParseTraceparent(parent).trace_id, "0af7651916cd43dd8448eb211c80319c");
  EXPECT_EQ(ParseTraceparent(parent).span_id, "b7ad6b7169203331");
  for (size_t length = 0; length < parent.size(); ++length)
    EXPECT_EQ(ParseTraceparent(absl::string_view(parent).substr(0, length)).trace_id, "") << length;
  EXPECT_TRUE(IsRequestId("a.B_9-"));
  for (const char* bad : {"", " ", "a b", "a\n", "\xC3\xA4"}) EXPECT_FALSE(IsRequestId(bad)) << bad;
  EXPECT_EQ(NewRequestId().size(), 16u);
  EXPECT_NE(NewRequestId(), NewRequestId());
}

}  // namespace
}  // namespace lamina::testing
