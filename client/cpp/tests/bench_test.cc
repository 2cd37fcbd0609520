// What lamina bench computes by itself: quantiles, sums of samples, when steps are to begin.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#include "cli/bench/samples.h"
#include "cli/bench/schedule.h"
#include "nlohmann/json.hpp"

namespace lamina::cli {
namespace {

using Clock = Schedule::Clock;

double Quantile(const std::vector<double>& values, double share) {
  Distribution distribution;
  for (const double value : values) distribution.Add(value);
  return distribution.Quantile(share);
}

TEST(Bench, QuantilesAreTheSmallestThatAShareDoesNotExceed) {
  EXPECT_EQ(Quantile({}, 0.5), 0);
  EXPECT_EQ(Quantile({7}, 0), 7);
  EXPECT_EQ(Quantile({7}, 0.999), 7);
  EXPECT_EQ(Quantile({2, 1}, 0.5), 1);
  EXPECT_EQ(Quantile({1, 3, 2}, 0.5), 2);
  EXPECT_EQ(Quantile({-1, 0, -3, 5e-324, -2}, 0.4), -2);
  EXPECT_EQ(Quantile({-1, 0, -3, -2}, 1), 0);
  std::vector<double> thousand(1000);
  std::iota(thousand.begin(), thousand.end(), 1.0);  // each with a bucket of its own
  EXPECT_EQ(Quantile(thousand, 0), 1);
  EXPECT_EQ(Quantile(thousand, 0.5), 500);
  EXPECT_EQ(Quantile(thousand, 0.9), 900);
  EXPECT_EQ(Quantile(thousand, 0.99), 990);
  EXPECT_EQ(Quantile(thousand, 0.999), 999);
  EXPECT_EQ(Quantile(thousand, 1), 1000);
  thousand.push_back(1001);
  EXPECT_EQ(Quantile(thousand, 0.999), 1000);
}

// Latencies around 1 ms and a few of up to seconds, a part of them merged, beside all of them
// sorted.
TEST(Bench, QuantilesOfManyValuesAreNearAndTakeLittleMemory) {
  std::mt19937_64 random(5);
  std::lognormal_distribution<double> usual(std::log(1e-3), 0.3), late(std::log(0.1), 1);
  std::vector<double> values;
  Distribution one, other;
  for (int i = 0; i < 400'000; ++i) {
    values.push_back(i % 500 == 0 ? late(random) : usual(random));
    (i % 3 == 0 ? one : other).Add(values.back());
  }
  one.Merge(other);
  std::sort(values.begin(), values.end());
  EXPECT_EQ(one.count(), 400'000);
  EXPECT_EQ(one.Quantile(0), values.front());
  EXPECT_EQ(one.Quantile(1), values.back());
  for (const double share : {0.001, 0.1, 0.5, 0.9, 0.99, 0.999, 0.9999}) {
    const double exact =
        values[static_cast<size_t>(std::ceil(share * static_cast<double>(values.size()) - 1e-9)) -
               1];
    EXPECT_GE(one.Quantile(share), exact);
    EXPECT_LT(one.Quantile(share), exact * (1 + 1.0 / Distribution::kBucketsPerOctave));
  }
  // No more than the octaves between the ends have.
  const double octaves = std::log2(values.back() / values.front()) + 1;
  EXPECT_LT(static_cast<double>(one.buckets()), octaves * Distribution::kBucketsPerOctave);
  const size_t before = one.buckets();
  for (const double value : values) one.Add(value);
  EXPECT_EQ(one.buckets(), before);
}

TEST(Bench, SamplesMerge) {
  Samples one, other;
  one.Add(0.004, {.queue_seconds = 0.001, .input_seconds = 0.0001, .compute_seconds = 0.002});
  one.AddError(absl::StatusCode::kResourceExhausted);
  other.Add(0.010, {.queue_seconds = 0.003, .compute_seconds = 0.006, .output_seconds = 0.0005});
  other.Add(0.002, {.queue_seconds = 0, .compute_seconds = 0.0015});
  other.AddError(absl::StatusCode::kResourceExhausted);
  other.AddError(absl::StatusCode::kDeadlineExceeded);
  one.Merge(other);
  const nlohmann::json json = one.Json(0.5);
  EXPECT_EQ(json["count"], 3);
  EXPECT_EQ(json["errors"], (nlohmann::json{{"RESOURCE_EXHAUSTED", 2}, {"DEADLINE_EXCEEDED", 1}}));
  EXPECT_DOUBLE_EQ(json["per_second"], 6);
  EXPECT_DOUBLE_EQ(json["min_ms"], 2);
  EXPECT_DOUBLE_EQ(json["median_ms"], 4);
  EXPECT_DOUBLE_EQ(json["p90_ms"], 10);
  EXPECT_DOUBLE_EQ(json["max_ms"], 10);
  EXPECT_DOUBLE_EQ(json["queue_median_ms"], 1);
  EXPECT_DOUBLE_EQ(json["compute_median_ms"], 2);
  EXPECT_DOUBLE_EQ(json["copy_median_ms"], 0.1);
  EXPECT_DOUBLE_EQ(json["overhead_median_ms"], 2);
}

TEST(Bench, WholeStepsHaveNoTimesOfTheDaemons) {
  Samples steps;
  steps.Add(0.5);
  const nlohmann::json json = steps.Json(1);
  EXPECT_DOUBLE_EQ(json["max_ms"], 500);
  EXPECT_FALSE(json.contains("compute_median_ms"));
}

TEST(Bench, ArrivalsArePoissonAndTheSeedsOwn) {
  constexpr double kRate = 40;
  constexpr int kCount = 20000;
  Arrivals arrivals(kRate, 3), same(kRate, 3), other(kRate, 4);
  std::vector<double> gaps;
  double last = 0, differences = 0;
  for (int i = 0; i < kCount; ++i) {
    const double at = arrivals.Next();
    ASSERT_GT(at, last);
    EXPECT_EQ(at, same.Next());
    differences += std::abs(at - other.Next());
    gaps.push_back(at - last);
    last = at;
  }
  EXPECT_GT(differences, 0);
  // Exponential gaps: mean and deviation 1 / rate, a share exp(-1) above the mean. Five standard
  // errors of each.
  const double root = std::sqrt(kCount);
  const double mean = last / kCount;
  EXPECT_NEAR(mean * kRate, 1, 5 / root);
  double squares = 0, above = 0;
  for (const double gap : gaps) {
    squares += (gap - mean) * (gap - mean);
    above += gap > mean ? 1 : 0;
  }
  EXPECT_NEAR(std::sqrt(squares / kCount) * kRate, 1, 5 * std::sqrt(2) / root);
  EXPECT_NEAR(above / kCount, std::exp(-1), 5 * 0.5 / root);
}

TEST(Bench, AClosedLoopBeginsAtOnceUntilTheTimeIsOver) {
  Schedule schedule(0, 1, 60);
  const Clock::time_point before = Clock::now();
  schedule.Start(before);
  const auto next = schedule.Next();
  ASSERT_TRUE(next.has_value());
  EXPECT_GE(*next, before);
  EXPECT_LE(*next, Clock::now());
  EXPECT_EQ(schedule.NotStarted(), 0);
  schedule.Stop();
  EXPECT_FALSE(schedule.Next().has_value());
  schedule.Start(Clock::now() - std::chrono::seconds(60));
  EXPECT_FALSE(schedule.Next().has_value());
}

TEST(Bench, AnOpenLoopKeepsToItsArrivalsHoweverLateAClientIs) {
  constexpr double kRate = 1000, kSeconds = 0.1;
  std::vector<double> wanted;
  Arrivals arrivals(kRate, 7);
  for (double at = arrivals.Next(); at < kSeconds; at = arrivals.Next()) wanted.push_back(at);
  ASSERT_GT(wanted.size(), 50u);

  Schedule schedule(kRate, 7, kSeconds);
  const Clock::time_point start = Clock::now();
  schedule.Start(start);
  size_t begun = 0;
  for (; const auto intended = schedule.Next(); ++begun) {
    ASSERT_LT(begun, wanted.size());
    EXPECT_NEAR(std::chrono::duration<double>(*intended - start).count(), wanted[begun], 1e-6);
    EXPECT_GE(Clock::now(), *intended);
    // A client that is busy for long: what arrives meanwhile counts from its arrival still.
    if (begun == 10) std::this_thread::sleep_for(std::chrono::milliseconds(30));
  }
  EXPECT_GT(begun, 10u);
  EXPECT_EQ(begun + static_cast<size_t>(schedule.NotStarted()), wanted.size());
}

TEST(Bench, ArrivalsThatNoClientTookAreCounted) {
  Schedule schedule(1000, 7, 0.1);
  schedule.Start(Clock::now() - std::chrono::seconds(1));  // its time is over
  EXPECT_FALSE(schedule.Next().has_value());
  Arrivals arrivals(1000, 7);
  int64_t count = 0;
  while (arrivals.Next() < 0.1) ++count;
  EXPECT_EQ(schedule.NotStarted(), count);
}

TEST(Bench, StopWakesAClientThatWaitsForAnArrival) {
  Schedule schedule(1e-6, 1, 3600e6);
  schedule.Start(Clock::now());
  std::thread waiting([&] { EXPECT_FALSE(schedule.Next().has_value()); });
  schedule.Stop();
  waiting.join();
}

}  // namespace
}  // namespace lamina::cli
