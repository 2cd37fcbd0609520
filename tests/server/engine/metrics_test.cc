#include "server/metrics/metrics.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <cmath>
#include <fstream>
#include <limits>
#include <mutex>
#include <regex>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "engine_rig.h"
#include "server/metrics/exposer.h"

namespace lamina::testing {
namespace {

class MetricsTest : public ::testing::Test {
 protected:
  // Whether the text has exactly this line.
  bool Has(const std::string& line) {
    return absl::StrContains(absl::StrCat("\n", metrics_.Text()), absl::StrCat("\n", line, "\n"));
  }
  size_t Lines() {
    return static_cast<size_t>(
        std::count_if(text_.begin(), text_.end(), [](char c) { return c == '\n'; }));
  }

  MetricSet metrics_{
      {.version = "1.2.3", .commit = "abc", .backend = "cpu", .device = "a \"chip\""}};
  std::string text_ = metrics_.Text();
};

TEST_F(MetricsTest, StepsLandInTheirSeries) {
  metrics_.StepDone(StepDirection::kBackward, {.samples = 2,
                                               .tokens = 256,
                                               .padding_tokens = 56,
                                               .flops = 1e9,
                                               .queue_seconds = 0.00005,
                                               .compute_seconds = 0.5,
                                               .total_seconds = 100});
  EXPECT_TRUE(Has("lamina_steps_total{direction=\"backward\"} 1"));
  EXPECT_TRUE(Has("lamina_steps_total{direction=\"apply\"} 0"));
  EXPECT_TRUE(Has("lamina_tokens_total{direction=\"backward\",kind=\"real\"} 200"));
  EXPECT_TRUE(Has("lamina_tokens_total{direction=\"backward\",kind=\"padding\"} 56"));
  EXPECT_TRUE(Has("lamina_achieved_flops_per_second{direction=\"backward\"} 2000000000"));
  const std::string bucket = "lamina_step_duration_seconds_bucket{direction=\"backward\",phase=";
  EXPECT_TRUE(Has(bucket + "\"queue\",le=\"0.0001\"} 1"));
  EXPECT_TRUE(Has(bucket + "\"compute\",le=\"0.4\"} 0"));
  EXPECT_TRUE(Has(bucket + "\"compute\",le=\"0.63\"} 1"));
  EXPECT_TRUE(Has(bucket + "\"total\",le=\"60\"} 0"));
  EXPECT_TRUE(Has(bucket + "\"total\",le=\"+Inf\"} 1"));
}

TEST_F(MetricsTest, OptimizerStepsTellTheLossScale) {
  EXPECT_TRUE(Has("lamina_loss_scale 0"));
  EXPECT_TRUE(Has("lamina_loss_scale_changes_total{change=\"growth\"} 0"));
  metrics_.GradientsApplied({.norm = 2, .next_loss_scale = 2048, .scale_grew = true});
  EXPECT_TRUE(Has("lamina_loss_scale 2048"));
  EXPECT_TRUE(Has("lamina_gradient_norm 2"));
  EXPECT_TRUE(Has("lamina_skipped_steps_total 0"));
  metrics_.GradientsApplied({.skipped = true, .next_loss_scale = 1024, .scale_backed_off = true});
  metrics_.GradientsApplied({.skipped = true, .next_loss_scale = 1024});
  EXPECT_TRUE(Has("lamina_loss_scale 1024"));
  EXPECT_TRUE(Has("lamina_skipped_steps_total 2"));
  EXPECT_TRUE(Has("lamina_loss_scale_changes_total{change=\"growth\"} 1"));
  EXPECT_TRUE(Has("lamina_loss_scale_changes_total{change=\"backoff\"} 1"));
}

TEST_F(MetricsTest, FlopsAreHeldAgainstThePeak) {
  const StepSample step{.flops = 1e9, .type = ComputeType::kBF16, .compute_seconds = 0.5};
  metrics_.StepDone(StepDirection::kBackward, step);
  EXPECT_TRUE(Has("lamina_mfu_ratio{direction=\"backward\"} 0"));  // no peak is known
  metrics_.SetPeakFlops(ComputeType::kBF16, 8e9, /*measured=*/false);
  metrics_.StepDone(StepDirection::kBackward, step);
  EXPECT_TRUE(Has("lamina_mfu_ratio{direction=\"backward\"} 0.25"));
  EXPECT_TRUE(Has("lamina_device_peak_flops_per_second{dtype=\"bf16\"} 8000000000"));
  EXPECT_TRUE(Has("lamina_device_peak_flops_per_second{dtype=\"fp32\"} 0"));
  // What was measured was not the most.
  metrics_.SetPeakFlops(ComputeType::kBF16, 1e9, /*measured=*/true);
  metrics_.StepDone(StepDirection::kBackward, step);
  EXPECT_TRUE(Has("lamina_mfu_ratio{direction=\"backward\"} 1"));
  EXPECT_TRUE(Has("lamina_device_peak_flops_per_second{dtype=\"bf16\"} 2000000000"));
}

TEST_F(MetricsTest, SessionsAreRankedByWhatTheyHold) {
  std::vector<SessionMemory> sessions;
  for (size_t i = 1; i <= 7; ++i)
    sessions.push_back({.region_bytes = i, .activation_bytes = 10 * i});
  metrics_.SetSessionMemory(sessions);
  EXPECT_TRUE(Has("lamina_session_memory_bytes{kind=\"regions\",rank=\"1\"} 7"));
  EXPECT_TRUE(Has("lamina_session_memory_bytes{kind=\"activations\",rank=\"5\"} 30"));
  EXPECT_TRUE(Has("lamina_session_memory_bytes{kind=\"regions\",rank=\"rest\"} 3"));
  metrics_.SetSessionMemory({{.region_bytes = 9}});
  EXPECT_TRUE(Has("lamina_session_memory_bytes{kind=\"regions\",rank=\"1\"} 9"));
  EXPECT_TRUE(Has("lamina_session_memory_bytes{kind=\"regions\",rank=\"2\"} 0"));
  EXPECT_TRUE(Has("lamina_session_memory_bytes{kind=\"activations\",rank=\"rest\"} 0"));
}

TEST_F(MetricsTest, LastStepsAreRemembered) {
  MetricSet metrics({}, /*logged_steps=*/4);
  const std::string long_name(100, 'n');
  for (int i = 1; i <= 6; ++i)
    metrics.StepDone(StepDirection::kForwardEval, {.tokens = 10.0 * i,
                                                   .compute_seconds = 0.5,
                                                   .stack = i == 6 ? long_name : "s",
                                                   .session = 3,
                                                   .request_id = "r",
                                                   .trace_id = "t",
                                                   .request_item = 5});
  EXPECT_EQ(metrics.steps().total(), 6u);
  const std::vector<StepRecord> steps = metrics.steps().Last(100);
  ASSERT_EQ(steps.size(), 4u);
  EXPECT_EQ(steps[0].number, 3u);
  EXPECT_EQ(steps[0].tokens, 30);
  EXPECT_STREQ(steps[0].stack.data(), "s");
  EXPECT_STREQ(steps[0].request_id.data(), "r");
  EXPECT_STREQ(steps[0].trace_id.data(), "t");
  EXPECT_EQ(steps[0].request_item, 5u);
  EXPECT_EQ(std::string(steps[3].stack.data()), std::string(64, 'n'));
  ASSERT_EQ(metrics.steps().Last(1).size(), 1u);
  EXPECT_EQ(metrics.steps().Last(1)[0].number, 6u);
}

TEST(StepLogTest, SumsUpSeconds) {
  lamina::StepLog log(8);
  const auto add = [&](double ended, StepDirection direction, double tokens) {
    StepRecord step{.ended = ended, .total = 0.25, .tokens = tokens, .direction = direction};
    log.Add(step);
  };
  add(1000.1, StepDirection::kBackward, 5);
  add(1000.9, StepDirection::kBackward, 7);
  add(1000.9, StepDirection::kApply, 0);
  add(1002.0, StepDirection::kForwardEval, 1);
  std::vector<StepSecond> seconds = log.Seconds(1002);
  ASSERT_EQ(seconds.size(), 2u);
  EXPECT_EQ(seconds[0].second, 1000);
  const auto of = [](const StepSecond& second, StepDirection direction) {
    return second.sums[static_cast<size_t>(direction)];
  };
  EXPECT_EQ(of(seconds[0], StepDirection::kBackward).steps, 2);
  EXPECT_EQ(of(seconds[0], StepDirection::kBackward).tokens, 12);
  EXPECT_EQ(of(seconds[0], StepDirection::kBackward).seconds, 0.5);
  EXPECT_EQ(of(seconds[0], StepDirection::kApply).steps, 1);
  EXPECT_EQ(of(seconds[1], StepDirection::kBackward).steps, 0);
  // One is forgotten when its place is needed, or its time has passed.
  add(1000.0 + lamina::StepLog::kSeconds, StepDirection::kApply, 0);
  seconds = log.Seconds(1000 + lamina::StepLog::kSeconds);
  ASSERT_EQ(seconds.size(), 2u);
  EXPECT_EQ(of(seconds[1], StepDirection::kBackward).steps, 0);
  EXPECT_EQ(log.Seconds(1002 + lamina::StepLog::kSeconds).size(), 1u);
}

TEST(StepLogTest, ReadersSeeWholeSteps) {
  lamina::StepLog log(4);
  std::atomic<bool> stop{false};
  std::vector<std::thread> writers;
  for (int t = 0; t < 2; ++t)
    writers.emplace_back([&] {
      while (!stop) {
        StepRecord step{.ended = 5, .tokens = 1};
        SetText(step.stack, std::string(64, 'a'));
        log.Add(step);
      }
    });
  uint64_t last = 0, seen = 0;
  for (int i = 0; i < 2000 || seen == 0; ++i) {
    for (const StepRecord& step : log.Last(4)) {
      ++seen;
      ASSERT_EQ(std::string(step.stack.data()), std::string(64, 'a'));
      ASSERT_EQ(step.tokens, 1);
      ASSERT_GT(step.number, 0u);
      last = std::max(last, step.number);
    }
    log.Seconds(6);
  }
  stop = true;
  for (std::thread& writer : writers) writer.join();
  EXPECT_LE(last, log.total());
}

TEST_F(MetricsTest, BucketsAreAboutOnePointSixApart) {
  metrics_.StepDone(StepDirection::kApply, {});
  std::vector<double> bounds;
  for (absl::string_view line : absl::StrSplit(metrics_.Text(), '\n')) {
    std::smatch match;
    const std::string text(line);
    static const std::regex pattern(
        "lamina_step_duration_seconds_bucket\\{direction=\"apply\",phase=\"total\",le=\"([0-9.e-]+)"
        "\"\\} .*");
    if (std::regex_match(text, match, pattern)) bounds.push_back(std::stod(match[1]));
  }
  ASSERT_GT(bounds.size(), 20u);
  EXPECT_LE(bounds.front(), 0.0001);
  EXPECT_GE(bounds.back(), 60);
  for (size_t i = 1; i < bounds.size(); ++i) {
    EXPECT_GT(bounds[i] / bounds[i - 1], 1.45);
    EXPECT_LT(bounds[i] / bounds[i - 1], 1.65);
  }
}

TEST_F(MetricsTest, EverySeriesIsThereFromTheStart) {
  for (const char* line :
       {"lamina_queue_depth 0", "lamina_admission_rejections_total{reason=\"queue_full\"} 0",
        "lamina_device_memory_bytes{kind=\"master_weights\"} 0", "lamina_sessions 0",
        "lamina_sessions_ended_total{reason=\"lease_expired\"} 0",
        "lamina_tensor_bytes_total{role=\"output\",transport=\"memfd\"} 0",
        "lamina_checkpoint_duration_seconds_count{op=\"load\"} 0"})
    EXPECT_TRUE(Has(line)) << line;
  EXPECT_TRUE(
      Has("lamina_build_info{backend=\"cpu\",commit=\"abc\",device=\"a \\\"chip\\\"\","
          "version=\"1.2.3\"} 1"));
}

TEST_F(MetricsTest, SessionEndsHaveBoundedReasons) {
  metrics_.SessionEnded("deleted");
  metrics_.SessionEnded("something a caller made up 1");
  metrics_.SessionEnded("something a caller made up 2");
  EXPECT_TRUE(Has("lamina_sessions_ended_total{reason=\"deleted\"} 1"));
  EXPECT_TRUE(Has("lamina_sessions_ended_total{reason=\"other\"} 2"));
}

TEST_F(MetricsTest, ResumedSessionsAreCountedByWhatCameBefore) {
  metrics_.SessionResumed(Resumption::kBreak);
  metrics_.SessionResumed(Resumption::kBreak);
  metrics_.SessionResumed(Resumption::kTakeover);
  EXPECT_TRUE(Has("lamina_sessions_resumed_total{after=\"break\"} 2"));
  EXPECT_TRUE(Has("lamina_sessions_resumed_total{after=\"takeover\"} 1"));
}

TEST_F(MetricsTest, RpcsAreCountedByCode) {
  RpcMethodMetrics& forward = metrics_.Rpc("lamina.v1.LayerService", "Forward", "unary");
  EXPECT_EQ(&forward, &metrics_.Rpc("lamina.v1.LayerService", "Forward", "unary"));
  forward.Started();
  forward.Handled(0, 0.002);
  forward.Handled(8, 0.002);
  forward.Handled(99, 0.002);
  const std::string labels = "grpc_method=\"Forward\",grpc_service=\"lamina.v1.LayerService\",";
  EXPECT_TRUE(Has("grpc_server_started_total{" + labels + "grpc_type=\"unary\"} 1"));
  EXPECT_TRUE(
      Has("grpc_server_handled_total{grpc_code=\"OK\"," + labels + "grpc_type=\"unary\"} 1"));
  EXPECT_TRUE(Has("grpc_server_handled_total{grpc_code=\"RESOURCE_EXHAUSTED\"," + labels +
                  "grpc_type=\"unary\"} 1"));
  EXPECT_TRUE(
      Has("grpc_server_handled_total{grpc_code=\"UNKNOWN\"," + labels + "grpc_type=\"unary\"} 1"));
  EXPECT_TRUE(Has("grpc_server_handling_seconds_count{" + labels + "grpc_type=\"unary\"} 3"));
}

TEST_F(MetricsTest, RefreshRunsBeforeEachScrape) {
  int64_t sessions = 3;
  metrics_.SetRefresh([&] { metrics_.SetSessions(sessions++, 1, 2, 4096); });
  EXPECT_TRUE(Has("lamina_sessions 3"));
  EXPECT_TRUE(Has("lamina_sessions 4"));
  EXPECT_TRUE(Has("lamina_region_bytes 4096"));
  metrics_.SetRefresh({});
  EXPECT_TRUE(Has("lamina_sessions_adrift 1"));
  EXPECT_TRUE(Has("lamina_sessions 5"));
  EXPECT_TRUE(Has("lamina_sessions 5"));
}

TEST_F(MetricsTest, FromManyThreads) {
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t)
    threads.emplace_back([&] {
      for (int i = 0; i < 200; ++i) {
        metrics_.StepDone(StepDirection::kForwardEval, {.samples = 1, .tokens = 1});
        metrics_.Rpc("s", absl::StrCat("m", i % 3), "unary").Handled(i % 17, 0.001);
        if (i % 50 == 0) metrics_.Text();
      }
    });
  for (std::thread& thread : threads) thread.join();
  EXPECT_TRUE(Has("lamina_steps_total{direction=\"forward_eval\"} 800"));
}

// Every family is in docs/metrics.md, and the page names no other.
TEST_F(MetricsTest, AreDocumented) {
  std::set<std::string> exported;
  metrics_.Rpc("s", "m", "unary").Handled(0, 1);
  for (absl::string_view line : absl::StrSplit(metrics_.Text(), '\n'))
    if (absl::StartsWith(line, "# TYPE ")) {
      const std::vector<std::string> words = absl::StrSplit(line, ' ');
      exported.insert(words[2]);
    }
  std::ifstream page(LAMINA_METRICS_PAGE);
  ASSERT_TRUE(page) << LAMINA_METRICS_PAGE;
  std::set<std::string> documented;
  std::string line;
  while (std::getline(page, line)) {
    std::smatch match;
    static const std::regex row("\\| `((?:lamina|grpc|process)_[a-z_]+)` \\|.*");
    if (std::regex_match(line, match, row)) documented.insert(match[1]);
  }
  EXPECT_EQ(documented, exported);
}

// One request over a plain socket.
std::string Get(int port, const std::string& path, const std::string& method = "GET") {
  const int fd = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  std::string reply;
  if (connect(fd, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) == 0) {
    const std::string request =
        absl::StrCat(method, " ", path,
                     " HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\nConnection: close"
                     "\r\n\r\n");
    EXPECT_EQ(send(fd, request.data(), request.size(), 0), static_cast<ssize_t>(request.size()));
    char buffer[4096];
    for (ssize_t n; (n = recv(fd, buffer, sizeof(buffer), 0)) > 0;)
      reply.append(buffer, static_cast<size_t>(n));
  }
  close(fd);
  return reply;
}

TEST_F(MetricsTest, AreServedOverHttp) {
  const auto exposer = Value(MetricsExposer::Start("127.0.0.1:0", metrics_));
  EXPECT_GT(exposer->port(), 0);
  EXPECT_EQ(exposer->address(), absl::StrCat("127.0.0.1:", exposer->port()));
  const std::string reply = Get(exposer->port(), "/metrics");
  EXPECT_TRUE(absl::StartsWith(reply, "HTTP/1.1 200 OK")) << reply.substr(0, 200);
  EXPECT_TRUE(absl::StrContains(reply, "\nlamina_queue_depth 0\n"));
  EXPECT_TRUE(absl::StartsWith(Get(exposer->port(), "/other"), "HTTP/1.1 404"));
  EXPECT_TRUE(absl::StartsWith(Get(exposer->port(), "/metrics/more"), "HTTP/1.1 404"));
  EXPECT_TRUE(absl::EndsWith(Get(exposer->port(), "/"), "\r\n\r\n/metrics\n"));
  EXPECT_THAT(MetricsExposer::Start(exposer->address(), metrics_).status(),
              IsStatus(kUnavailable, exposer->address()));
}

TEST_F(MetricsTest, PagesAreServedBesideThem) {
  // The server's thread and this one meet in a socket, of whose order sanitizers know nothing.
  std::mutex mutex;
  std::string asked = "nothing";
  const auto exposer = Value(MetricsExposer::Start(
      "127.0.0.1:0", metrics_,
      {{"/page",
        [&](const std::string& query) {
          const std::lock_guard<std::mutex> lock(mutex);
          asked = query;
          return HttpAnswer{.code = 503, .type = "text/html", .body = "<p>no</p>"};
        }},
       {"/page.json", [](const std::string&) { return HttpAnswer{.body = "{}"}; }},
       {"/broken",
        [](const std::string&) -> HttpAnswer { throw std::runtime_error("it broke"); }}}));
  std::string reply = Get(exposer->port(), "/page?a=b");
  {
    const std::lock_guard<std::mutex> lock(mutex);
    EXPECT_EQ(asked, "a=b");
  }
  EXPECT_TRUE(absl::StartsWith(reply, "HTTP/1.1 503 Service Unavailable\r\n")) << reply;
  EXPECT_TRUE(absl::StrContains(reply, "\r\nContent-Type: text/html\r\n"));
  EXPECT_TRUE(absl::StrContains(reply, "\r\nContent-Security-Policy: default-src 'none'\r\n"));
  EXPECT_TRUE(absl::EndsWith(reply, "\r\n\r\n<p>no</p>"));
  EXPECT_TRUE(absl::EndsWith(Get(exposer->port(), "/page.json"), "\r\n\r\n{}"));
  EXPECT_TRUE(absl::StartsWith(Get(exposer->port(), "/broken"), "HTTP/1.1 500"));
  reply = Get(exposer->port(), "/page", "HEAD");
  EXPECT_TRUE(absl::StartsWith(reply, "HTTP/1.1 503"));
  EXPECT_TRUE(absl::EndsWith(reply, "\r\n\r\n"));
  for (const char* method : {"POST", "PUT", "DELETE", "OPTIONS", "PATCH"})
    EXPECT_TRUE(absl::StartsWith(Get(exposer->port(), "/page", method), "HTTP/1.1 405")) << method;
}

TEST_F(MetricsTest, AddressesAreChecked) {
  for (const char* address : {"", "9090", ":9090", "127.0.0.1:", "127.0.0.1:-1", "127.0.0.1:65536",
                              "127.0.0.1:1,0.0.0.0:2", "127.0.0.1:90s", "127.0.0.1:9 0"})
    EXPECT_THAT(MetricsExposer::Start(address, metrics_).status(), IsStatus(kInvalid, "HOST:PORT"))
        << address;
}

}  // namespace
}  // namespace lamina::testing
