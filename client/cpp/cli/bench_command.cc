// lamina bench: what steps cost clients, by transport and shape, and how many the daemon can do.
#include <cstdio>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "cli/bench/load.h"
#include "cli/commands.h"
#include "nlohmann/json.hpp"

namespace lamina::cli {
namespace {

std::string Rounded(const nlohmann::json& call, const char* name) {
  const auto found = call.find(name);
  if (found == call.end()) return "-";
  char text[32];
  std::snprintf(text, sizeof(text), "%.3f", found->get<double>());
  return text;
}

std::string Rate(double value) {
  char text[32];
  std::snprintf(text, sizeof(text), value < 100 ? "%.2f" : "%.0f", value);
  return text;
}

void AddRow(Table* table, const std::string& transport, const std::string& shape, const char* name,
            const nlohmann::json& call) {
  int64_t errors = 0;
  for (const auto& [status, count] : call["errors"].items()) errors += count.get<int64_t>();
  std::vector<std::string> row = {
      transport, shape, name, std::to_string(call["count"].get<int64_t>()), std::to_string(errors)};
  for (const char* column :
       {"min_ms", "median_ms", "p90_ms", "p99_ms", "p999_ms", "max_ms", "queue_median_ms",
        "compute_median_ms", "copy_median_ms", "overhead_median_ms"}) {
    row.push_back(Rounded(call, column));
  }
  table->Add(std::move(row));
}

// What came out, transport by transport and shape by shape: as JSON and as text.
class Report {
 public:
  void Add(const std::string& transport, const client::Shape& shape, const LoadOptions& load,
           const LoadResult& result) {
    const auto steps = static_cast<double>(result.step.count());
    const double steps_per_second = steps / result.seconds;
    const double samples_per_second = steps_per_second * static_cast<double>(shape[0]);
    const double tokens_per_second = samples_per_second * static_cast<double>(shape[1]);
    nlohmann::json json = {
        {"transport", transport},
        {"batch", shape[0]},
        {"seq", shape[1]},
        {"steps", result.step.count()},
        {"seconds", result.seconds},
        {"steps_per_second", steps_per_second},
        {"calls_per_second",
         static_cast<double>(result.forward.count() + result.backward.count()) / result.seconds},
        {"samples_per_second", samples_per_second},
        {"tokens_per_second", tokens_per_second},
        {"forward", result.forward.Json(result.seconds)}};
    const std::string size = absl::StrCat(shape[0], "x", shape[1]);
    AddRow(&table_, transport, size, "forward", json["forward"]);
    if (load.train) {
      json["backward"] = result.backward.Json(result.seconds);
      json["step"] = result.step.Json(result.seconds);
      AddRow(&table_, transport, size, "backward", json["backward"]);
      AddRow(&table_, transport, size, "step", json["step"]);
    }
    absl::StrAppend(&notes_, "\n", transport, " ", size, ": ", Rate(steps_per_second), " steps/s, ",
                    Rate(json["calls_per_second"]), " calls/s, ", Rate(samples_per_second),
                    " samples/s, ", HumanCount(static_cast<int64_t>(tokens_per_second)),
                    " tokens/s");
    if (load.rate > 0) {
      json["not_started"] = result.not_started;
      if (result.not_started > 0) {
        absl::StrAppend(&notes_, "; ", HumanCount(result.not_started),
                        " more steps arrived and found no free client in time");
      }
    }
    for (const char* call : {"forward", "backward"}) {
      if (!json.contains(call)) continue;
      for (const auto& [status, count] : json[call]["errors"].items()) {
        absl::StrAppend(&notes_, "\n", transport, " ", size, ": ", call, ": ",
                        HumanCount(count.get<int64_t>()), " ", status);
      }
    }
    results_.push_back(std::move(json));
  }
  void AddUnavailable(const std::string& transport, const client::Shape& shape,
                      const std::string& why) {
    results_.push_back(
        {{"transport", transport}, {"batch", shape[0]}, {"seq", shape[1]}, {"unavailable", why}});
    absl::StrAppend(&notes_, "\n", transport, ": unavailable: ", why);
  }

  nlohmann::json TakeJson() { return std::move(results_); }
  std::string Text() const { return absl::StrCat(table_.Text(), "\n", notes_); }

 private:
  nlohmann::json results_ = nlohmann::json::array();
  Table table_{{"TRANSPORT", "SHAPE", "CALL", "COUNT", "ERRORS", "MIN ms", "MEDIAN", "P90", "P99",
                "P99.9", "MAX", "QUEUE", "COMPUTE", "COPY", "OVERHEAD"}};
  std::string notes_;
};

std::vector<client::Shape> Shapes(const BenchOptions& bench, const client::StackConfig& config) {
  std::vector<client::Shape> shapes;
  for (const auto& [batch, seq] : bench.shapes) shapes.push_back({batch, seq, config.hidden_size});
  if (shapes.empty()) {
    shapes.push_back({bench.batch == 0 ? config.batch_size : bench.batch,
                      bench.seq == 0 ? config.max_seq_length : bench.seq, config.hidden_size});
  }
  return shapes;
}

LoadOptions ToLoad(const GlobalOptions& options, const BenchOptions& bench) {
  return {.stack = bench.stack,
          .concurrency = bench.concurrency,
          .pipeline = bench.pipeline,
          .depth = bench.depth.value_or(32),
          .seconds = bench.seconds,
          .warmup = bench.warmup,
          .rate = bench.rate,
          .seed = bench.seed.value_or(1),
          .timeout = ToConnect(options).call_timeout};
}

}  // namespace

int Bench(const GlobalOptions& options, const BenchOptions& bench) {
  return WithClient(options, [&](const client::Client& daemon) -> int {
    const absl::StatusOr<client::StackInfo> info = daemon.GetStack(bench.stack);
    if (!info.ok()) return Fail(options, info.status());
    const client::StackConfig& config = info->config;
    LoadOptions load = ToLoad(options, bench);
    load.train = config.training && !bench.forward_only;
    const ConnectFunction connect = [&options] {
      return client::Client::Connect(options.target, ToConnect(options));
    };

    Report report;
    std::vector<std::pair<const char*, client::TransportPolicy>> transports;
    if (bench.regions) transports.push_back({"regions", client::TransportPolicy::kRegions});
    if (bench.inline_tensors) transports.push_back({"inline", client::TransportPolicy::kInline});
    for (const client::Shape& shape : Shapes(bench, config)) {
      for (const auto& [name, policy] : transports) {
        load.shape = shape;
        load.transport = policy;
        const absl::StatusOr<LoadResult> result = GenerateLoad(connect, load);
        if (result.ok()) {
          report.Add(name, shape, load, *result);
        } else if (absl::IsUnavailable(result.status()) && transports.size() == 2 &&
                   policy == client::TransportPolicy::kRegions) {
          // From afar there are no regions: that is a result where the other transport was asked
          // too.
          report.AddUnavailable(name, shape, std::string(result.status().message()));
        } else {
          return Fail(options, result.status());
        }
      }
    }
    const char* calls = bench.pipeline ? "pipeline" : "unary";
    if (options.json) {
      nlohmann::json json = {{"stack", bench.stack},
                             {"hidden_size", config.hidden_size},
                             {"dtype", client::Name(config.dtype)},
                             {"num_hidden_layers", config.num_hidden_layers},
                             {"training", load.train},
                             {"concurrency", load.concurrency},
                             {"calls", calls},
                             {"loop", load.rate > 0 ? "open" : "closed"},
                             {"warmup", load.warmup},
                             {"results", report.TakeJson()}};
      if (bench.pipeline) json["depth"] = load.depth;
      if (load.rate > 0) {
        json["rate"] = load.rate;
        json["seed"] = load.seed;
      }
      PrintJson(json);
    } else {
      PrintText(absl::StrCat(
          bench.stack, ": H ", config.hidden_size, ", ", client::Name(config.dtype), ", ",
          config.num_hidden_layers, " layers, ", load.train ? "forward and backward" : "forward",
          "; ", load.concurrency, load.concurrency == 1 ? " client, " : " clients, ", calls,
          " calls, ",
          load.rate > 0 ? absl::StrCat("open loop of ", load.rate, " steps/s") : "closed loop",
          "\n\n", report.Text()));
    }
    return kOk;
  });
}

}  // namespace lamina::cli
