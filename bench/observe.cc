// What observing a step costs: everything that the engine tells the metrics of one step, timed.
//
// Usage: observe [--seconds S] [--output text|json]
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <string>
#include <thread>
#include <vector>

#include "CLI/CLI.hpp"
#include "nlohmann/json.hpp"
#include "server/metrics/metrics.h"

namespace lamina {
namespace {

using Clock = std::chrono::steady_clock;

// One Forward as the engine and the RPC's interceptor report it: what a step of a region's tensors
// with lengths comes to.
void ObserveStep(MetricSet& metrics, RpcMethodMetrics& rpc, uint64_t i) {
  rpc.Started();
  metrics.SetQueueDepth(1);
  metrics.SetQueueDepth(0);
  metrics.SetActivations(i % 7, 7);
  metrics.SetContexts(1);
  for (int tensor = 0; tensor < 3; ++tensor)
    metrics.TensorMoved(TensorCarrier::kMemfd, TensorRole::kInput, 1 << 20);
  const double compute = 1e-3 * (1 + 1e-2 * static_cast<double>(i % 100));
  metrics.StepDone(StepDirection::kForwardTraining,
                   {.samples = 8,
                    .tokens = 1024,
                    .padding_tokens = 100,
                    .flops = 1e11,
                    .type = ComputeType::kBF16,
                    .queue_seconds = 1e-5,
                    .input_seconds = 2e-5,
                    .compute_seconds = compute,
                    .output_seconds = 2e-5,
                    .total_seconds = compute + 1e-4,
                    .stack = "encoder",
                    .session = 1,
                    .request_id = "0123456789abcdef",
                    .trace_id = "0af7651916cd43dd8448eb211c80319c"});
  rpc.Handled(0, compute + 2e-4);
}

// Nanoseconds a step: the median of batches.
double Time(MetricSet& metrics, double seconds) {
  constexpr int kBatch = 1000;
  RpcMethodMetrics& rpc = metrics.Rpc("lamina.v1.LayerService", "Forward", "unary");
  metrics.SetPeakFlops(ComputeType::kBF16, 1e15, false);
  std::vector<double> batches;
  const Clock::time_point end = Clock::now() + std::chrono::duration_cast<Clock::duration>(
                                                   std::chrono::duration<double>(seconds));
  uint64_t i = 0;
  do {
    const Clock::time_point begin = Clock::now();
    for (int step = 0; step < kBatch; ++step) ObserveStep(metrics, rpc, ++i);
    batches.push_back(std::chrono::duration<double, std::nano>(Clock::now() - begin).count() /
                      kBatch);
  } while (Clock::now() < end);
  std::nth_element(batches.begin(), batches.begin() + static_cast<long>(batches.size() / 2),
                   batches.end());
  return batches[batches.size() / 2];
}

int Run(double seconds, bool json) {
  MetricSet metrics({.version = "0", .backend = "cpu", .device = "none"});
  const double alone = Time(metrics, seconds);
  // A scraper that never rests, which is some 10000 times what Prometheus does.
  std::atomic<bool> stop{false};
  std::atomic<int64_t> scrapes{0};
  std::thread scraper([&] {
    while (!stop) {
      metrics.Text();
      metrics.steps().Last(MetricSet::kLoggedSteps);
      ++scrapes;
    }
  });
  const double scraped = Time(metrics, seconds);
  stop = true;
  scraper.join();
  constexpr double kStep = 1e6;  // ns
  if (json) {
    std::printf("%s\n", nlohmann::json{{"step_ns", alone},
                                       {"step_ns_while_scraped", scraped},
                                       {"scrapes", scrapes.load()},
                                       {"share_of_1_ms_step", alone / kStep},
                                       {"share_of_1_ms_step_while_scraped", scraped / kStep}}
                            .dump(2)
                            .c_str());
  } else {
    std::printf("observing a step takes %.0f ns: %.3f %% of a step of 1 ms\n", alone,
                100 * alone / kStep);
    std::printf("while scraped without a pause (%lld times) %.0f ns: %.3f %%\n",
                static_cast<long long>(scrapes.load()), scraped, 100 * scraped / kStep);
  }
  return alone < 0.01 * kStep ? 0 : 1;
}

}  // namespace
}  // namespace lamina

int main(int argc, char** argv) {
  CLI::App app{
      "What observing a step costs. Exits with 1 where it is 1 % of a step of 1 ms or more."};
  double seconds = 1;
  std::string output = "text";
  app.add_option("--seconds", seconds, "How long to measure each of the two cases")
      ->check(CLI::Range(0.001, 60.0))
      ->capture_default_str();
  app.add_option("--output", output, "text or json")
      ->check(CLI::IsMember({"text", "json"}))
      ->capture_default_str();
  CLI11_PARSE(app, argc, argv);
  return lamina::Run(seconds, output == "json");
}
