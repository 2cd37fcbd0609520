// lamina bench: what a step costs a client, by transport.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <vector>

#include "absl/strings/str_cat.h"
#include "cli/commands.h"
#include "cli/describe.h"
#include "nlohmann/json.hpp"

namespace lamina::cli {
namespace {

using client::Tensor;
using Clock = std::chrono::steady_clock;

// The first calls touch pages and choose kernels.
constexpr int kWarmupSteps = 3;

double SecondsSince(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// The smallest value that at least `share` of all do not exceed; 0 of none.
double Quantile(std::vector<double> values, double share) {
  if (values.empty()) return 0;
  std::sort(values.begin(), values.end());
  const double rank = std::ceil(share * static_cast<double>(values.size()));
  return values[static_cast<size_t>(std::max(rank, 1.0)) - 1];
}

// One kind of call: seconds as the client saw them and as the daemon spent them.
struct Calls {
  std::vector<double> latency, compute, queue, copy, overhead;

  void Add(double seconds, const client::StepTiming& timing) {
    const double copied = timing.input_seconds + timing.output_seconds;
    latency.push_back(seconds);
    compute.push_back(timing.compute_seconds);
    queue.push_back(timing.queue_seconds);
    copy.push_back(copied);
    overhead.push_back(seconds - timing.compute_seconds);
  }
  nlohmann::json Json() const {
    return {{"count", latency.size()},
            {"median_ms", 1e3 * Quantile(latency, 0.5)},
            {"p99_ms", 1e3 * Quantile(latency, 0.99)},
            {"compute_median_ms", 1e3 * Quantile(compute, 0.5)},
            {"queue_median_ms", 1e3 * Quantile(queue, 0.5)},
            {"copy_median_ms", 1e3 * Quantile(copy, 0.5)},
            {"overhead_median_ms", 1e3 * Quantile(overhead, 0.5)}};
  }
};

struct Measured {
  Calls forward, backward;
  double seconds = 0;
  int64_t steps = 0;
};

absl::Status Step(const client::Stack& stack, const Tensor& x, const Tensor& y, bool train,
                  Measured* into) {
  Clock::time_point start = Clock::now();
  absl::StatusOr<client::ForwardResult> forward =
      stack.Forward(x, {.output = y, .training = train});
  if (!forward.ok()) return forward.status();
  if (into != nullptr) into->forward.Add(SecondsSince(start), forward->timing);
  if (!train) return absl::OkStatus();
  start = Clock::now();
  // The output is as good a gradient as any; the input's goes where the input is not needed again.
  const absl::StatusOr<client::BackwardResult> backward =
      stack.Backward(forward->context, y, {.input_grad = x});
  if (!backward.ok()) return backward.status();
  if (into != nullptr) into->backward.Add(SecondsSince(start), backward->timing);
  return absl::OkStatus();
}

void Fill(std::vector<float>* values) {
  for (size_t i = 0; i < values->size(); ++i) {
    (*values)[i] = static_cast<float>(std::sin(0.37 * static_cast<double>(i)));
  }
}

absl::StatusOr<Measured> Measure(const client::Client& daemon, const BenchOptions& bench,
                                 client::TransportPolicy transport, const client::Shape& shape,
                                 bool train) {
  const absl::StatusOr<client::Session> session =
      daemon.OpenSession({.client_name = "lamina bench", .transport = transport});
  if (!session.ok()) return session.status();
  const absl::StatusOr<client::Stack> stack = session->OpenStack(bench.stack);
  if (!stack.ok()) return stack.status();
  const absl::StatusOr<Tensor> x = session->NewTensor(stack->config().dtype, shape);
  if (!x.ok()) return x.status();
  const absl::StatusOr<Tensor> y = session->NewTensor(stack->config().dtype, shape);
  if (!y.ok()) return y.status();
  std::vector<float> values(x->size());
  Fill(&values);

  Measured measured;
  Clock::time_point start = Clock::now();
  for (int64_t step = -kWarmupSteps; step <= 0 || measured.seconds < bench.seconds; ++step) {
    if (step == 0) start = Clock::now();
    // Backward wrote the input's gradient over it, and many of those would overflow.
    if (absl::Status status = x->CopyFrom(values); !status.ok()) return status;
    absl::Status status = Step(*stack, *x, *y, train, step < 0 ? nullptr : &measured);
    if (!status.ok()) return status;
    if (step >= 0) {
      ++measured.steps;
      measured.seconds = SecondsSince(start);
    }
  }
  if (train) {
    if (absl::Status status = stack->ZeroGradients(); !status.ok()) return status;
  }
  return measured;
}

std::string Rounded(double value) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.3f", value);
  return text;
}

void AddRow(Table* table, const std::string& transport, const char* call,
            const nlohmann::json& json) {
  table->Add({transport, call, std::to_string(json["count"].get<int64_t>()),
              Rounded(json["median_ms"]), Rounded(json["p99_ms"]),
              Rounded(json["compute_median_ms"]), Rounded(json["copy_median_ms"]),
              Rounded(json["overhead_median_ms"])});
}

}  // namespace

int Bench(const GlobalOptions& options, const BenchOptions& bench) {
  return WithClient(options, [&](const client::Client& daemon) -> int {
    const absl::StatusOr<client::StackInfo> info = daemon.GetStack(bench.stack);
    if (!info.ok()) return Fail(options, info.status());
    const client::StackConfig& config = info->config;
    const client::Shape shape = {bench.batch == 0 ? config.batch_size : bench.batch,
                                 bench.seq == 0 ? config.max_seq_length : bench.seq,
                                 config.hidden_size};
    const bool train = config.training && !bench.forward_only;
    const double tokens = static_cast<double>(shape[0] * shape[1]);

    nlohmann::json results = nlohmann::json::array();
    Table table({"TRANSPORT", "CALL", "COUNT", "MEDIAN ms", "P99 ms", "COMPUTE ms", "COPY ms",
                 "OVERHEAD ms"});
    std::string rates;
    const auto measure = [&](const char* name, client::TransportPolicy policy) -> absl::Status {
      const absl::StatusOr<Measured> measured = Measure(daemon, bench, policy, shape, train);
      if (!measured.ok()) return measured.status();
      const double tokens_per_second =
          tokens * static_cast<double>(measured->steps) / measured->seconds;
      nlohmann::json result = {{"transport", name},
                               {"steps", measured->steps},
                               {"seconds", measured->seconds},
                               {"tokens_per_second", tokens_per_second},
                               {"forward", measured->forward.Json()}};
      AddRow(&table, name, "forward", result["forward"]);
      if (train) {
        result["backward"] = measured->backward.Json();
        AddRow(&table, name, "backward", result["backward"]);
      }
      absl::StrAppend(&rates, "\n", name, ": ", HumanCount(static_cast<int64_t>(tokens_per_second)),
                      " tokens/s");
      results.push_back(std::move(result));
      return absl::OkStatus();
    };
    if (bench.regions) {
      absl::Status status = measure("regions", client::TransportPolicy::kRegions);
      // From afar there are no regions: that is a result where the other transport was asked too.
      if (status.code() == absl::StatusCode::kUnavailable && bench.inline_tensors) {
        results.push_back(
            {{"transport", "regions"}, {"unavailable", std::string(status.message())}});
        absl::StrAppend(&rates, "\nregions: unavailable: ", status.message());
      } else if (!status.ok()) {
        return Fail(options, status);
      }
    }
    if (bench.inline_tensors) {
      if (absl::Status status = measure("inline", client::TransportPolicy::kInline); !status.ok()) {
        return Fail(options, status);
      }
    }
    if (options.json) {
      PrintJson(nlohmann::json{{"stack", bench.stack},
                               {"batch", shape[0]},
                               {"seq", shape[1]},
                               {"hidden_size", shape[2]},
                               {"dtype", client::Name(config.dtype)},
                               {"num_hidden_layers", config.num_hidden_layers},
                               {"training", train},
                               {"results", std::move(results)}});
    } else {
      PrintText(absl::StrCat(bench.stack, ": B ", shape[0], ", S ", shape[1], ", ",
                             client::Name(config.dtype), ", ", config.num_hidden_layers,
                             " layers, ", train ? "forward and backward" : "forward", "\n\n",
                             table.Text(), "\n", rates));
    }
    return kOk;
  });
}

}  // namespace lamina::cli
