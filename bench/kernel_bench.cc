// bench/kernels calls it. Times every op of a layer by itself, at a layer's shapes, through the
// Backend API, and sets each against what this device did in the same run: a large product's FLOP/s
// and a copy's bytes a second. An op's floor is the larger of its FLOPs and its bytes at those
// rates; its share is floor by time. Beside an op that bytes alone bound stands what a copy that
// moves as many bytes takes, called and timed alike: a short one never reaches the large copy's
// rate.
//
// Operands are not in the cache: each call takes the next of several sets. Within a layer some are,
// so that a layer may take less than the sum of its ops.
#include <algorithm>
#include <cstdio>
#include <ctime>
#include <exception>
#include <fstream>
#include <map>
#include <optional>
#include <regex>
#include <string>
#include <vector>

#include "CLI/CLI.hpp"
#include "absl/strings/numbers.h"
#include "absl/strings/str_split.h"
#include "device.h"
#include "layer_ops.h"
#include "nlohmann/json.hpp"
#include "op_timer.h"

namespace lamina::bench {
namespace {

using Json = nlohmann::ordered_json;

struct Options {
  std::string device = "cpu";
  std::string shapes =
      "64,128,1024,16,4096;16,512,1024,16,4096;4,2048,1024,16,4096;32,384,1024,16,4096;"
      "8,1024,1024,16,4096";
  std::string dtypes = "bf16";
  double dropout = 0.1;
  int64_t layers = 24;
  int repetitions = 20;
  std::string json;
  bool unordered = false;
  std::string ops = ".*";
  double sustained = 0;
};

struct Shape {
  LayerDims dims;
  int64_t layers;
};

// B,S,H,A,I of a layer, and L where it is not `layers`.
std::vector<Shape> ParseShapes(const std::string& text, int64_t layers) {
  std::vector<Shape> shapes;
  for (const auto& shape : absl::StrSplit(text, ';', absl::SkipWhitespace())) {
    std::vector<int64_t> v;
    for (const auto& number : absl::StrSplit(shape, ',')) {
      int64_t value = 0;
      if (!absl::SimpleAtoi(number, &value) || value < 1) break;
      v.push_back(value);
    }
    const size_t numbers = 1 + static_cast<size_t>(std::count(shape.begin(), shape.end(), ','));
    if (v.size() != numbers || numbers < 5 || numbers > 6 || v[2] % v[3] != 0)
      throw std::runtime_error("shape \"" + std::string(shape) +
                               "\" is not B,S,H,A,I or B,S,H,A,I,L with A a divisor of H");
    shapes.push_back(
        {.dims = {.batch = v[0], .seq = v[1], .hidden = v[2], .heads = v[3], .intermediate = v[4]},
         .layers = numbers == 6 ? v[5] : layers});
  }
  return shapes;
}

// One layer's forward and backward as the sum of its ops.
struct LayerSum {
  double us = 0, floor_us = 0;
  bool complete = true;  // no op of it was left out
};

class Bench {
 public:
  explicit Bench(const Options& options)
      : options_(options),
        wanted_(options.ops),
        device_(options.device),
        timer_(device_, options.repetitions) {
    if (options.sustained > 0) {
      meter_ = PowerMeter::Open(device_.backend().info().uuid);
      if (!meter_)
        throw std::runtime_error("--sustained: no energy counter of " + options.device +
                                 " (NVML's, of a GPU)");
    }
    char date[16];
    const std::time_t now = std::time(nullptr);
    std::strftime(date, sizeof(date), "%Y-%m-%d", std::gmtime(&now));
    result_ = {{"device", device_.backend().info().name},
               {"uuid", device_.backend().info().uuid},
               {"date", date},
               {"dropout", options.dropout},
               {"ceilings", Json::array()},
               {"rows", Json::array()},
               {"layer_sums", Json::array()}};
  }

  void Run() {
    const std::vector<Shape> shapes = ParseShapes(options_.shapes, options_.layers);
    for (const auto& name : absl::StrSplit(options_.dtypes, ',')) {
      const DType dtype = ParseDType(std::string(name));
      ceilings_ =
          MeasureCeilings(device_, timer_, dtype, meter_ ? &*meter_ : nullptr, options_.sustained);
      std::printf("%s, %s: product %.4g TFLOP/s, copy %.4g TB/s\n",
                  device_.backend().info().name.c_str(), Name(dtype), ceilings_.flops / 1e12,
                  ceilings_.bytes / 1e12);
      Json ceilings = {{"dtype", Name(dtype)},
                       {"product_tflops", ceilings_.flops / 1e12},
                       {"copy_tbs", ceilings_.bytes / 1e12}};
      if (const auto& energy = ceilings_.energy) {
        ceilings.update({{"pj_per_flop", energy->flop_picojoules},
                         {"pj_per_byte", energy->byte_picojoules},
                         {"sustained_product", ToJson(energy->product)},
                         {"sustained_copy", ToJson(energy->copy)}});
        for (const auto& [what, s] :
             {std::pair("product", energy->product), std::pair("copy", energy->copy)}) {
          std::printf("for long: %s %.4g us, %.4g mJ, %.0f W, %.0f MHz\n", what, s.us,
                      s.millijoules, s.watts, s.megahertz);
        }
        std::printf("          %.4g pJ a FLOP, %.4g pJ a byte\n", energy->flop_picojoules,
                    energy->byte_picojoules);
      }
      result_["ceilings"].push_back(std::move(ceilings));
      for (Shape shape : shapes) {
        shape.dims.dtype = dtype;
        RunShape(shape.dims, shape.layers);
      }
    }
  }

 private:
  static Json ToJson(const Sustained& s) {
    return {{"us", s.us}, {"mj", s.millijoules}, {"w", s.watts}, {"mhz", s.megahertz}};
  }

  void RunShape(const LayerDims& dims, int64_t layers) {
    shape_ = {{"batch", dims.batch},
              {"seq", dims.seq},
              {"hidden", dims.hidden},
              {"heads", dims.heads},
              {"intermediate", dims.intermediate},
              {"layers", layers},
              {"dtype", Name(dims.dtype)}};
    std::printf("\nB %ld, S %ld, H %ld, A %ld, I %ld, %s, dropout %g%s\n",
                static_cast<long>(dims.batch), static_cast<long>(dims.seq),
                static_cast<long>(dims.hidden), static_cast<long>(dims.heads),
                static_cast<long>(dims.intermediate), Name(dims.dtype), options_.dropout,
                device_.backend().sizes().FusedAttention(dims) ? "" : ", plain attention");
    std::printf("%-48s %9s %9s %9s %9s %9s %9s %9s  %5s %9s", "", "us", "min", "max", "MB", "GFLOP",
                "GB/s", "TFLOP/s", "share", "copy us");
    if (meter_) std::printf(" %9s %9s %9s %9s", "long: us", "mJ", "W", "MHz");
    std::printf("\n");

    const Scratch scratch(device_, dims);
    LayerSum pre_norm, post_norm;
    for (const OpCase& op :
         LayerOps(dims, static_cast<float>(options_.dropout), layers, scratch.workspace())) {
      std::optional<Timing> timing;
      if (std::regex_search(op.name, wanted_)) timing = RunOp(op, scratch.workspace());
      if (!timing) {
        if (op.calls_pre_norm > 0) pre_norm.complete = false;
        if (op.calls_post_norm > 0) post_norm.complete = false;
        continue;
      }
      const double floor = ceilings_.FloorUs(op.flops, static_cast<double>(timing->moved_bytes));
      for (auto [sum, calls] :
           {std::pair(&pre_norm, op.calls_pre_norm), std::pair(&post_norm, op.calls_post_norm)}) {
        sum->us += calls * timing->median_us;
        sum->floor_us += calls * floor;
      }
      if (!options_.unordered || !op.sums_tokens) continue;
      Workspace unordered = scratch.workspace();
      unordered.unordered = true;
      RunOp(op, unordered);
    }
    PrintSum("Post-LN", post_norm, false, layers);
    PrintSum("Pre-LN", pre_norm, true, layers);
    WriteJson();
  }

  // Nothing where the op failed, for lack of memory say: the others are timed all the same.
  std::optional<Timing> RunOp(const OpCase& op, const Workspace& workspace) {
    Json row = shape_;
    row.update({{"op", op.name}, {"unordered", workspace.unordered}});
    Timing t;
    try {
      t = timer_.Time(op, workspace);
    } catch (const std::exception& error) {
      std::printf("%-48s %s\n", op.name.c_str(), error.what());
      row["error"] = error.what();
      result_["rows"].push_back(std::move(row));
      return std::nullopt;
    }
    const auto bytes = static_cast<double>(t.moved_bytes);
    const double floor = ceilings_.FloorUs(op.flops, bytes);
    const double gbs = bytes / t.median_us * 1e-3, tflops = op.flops / t.median_us * 1e-6;
    const std::string name = op.name + (workspace.unordered ? ", unordered" : "");
    std::printf("%-48s %9.2f %9.2f %9.2f %9.2f", name.c_str(), t.median_us, t.min_us, t.max_us,
                bytes * 1e-6);
    if (op.flops > 0)
      std::printf(" %9.3f %9.1f %9.3f", op.flops * 1e-9, gbs, tflops);
    else
      std::printf(" %9s %9.1f %9s", "-", gbs, "-");
    std::printf("  %4.0f%%", 100 * floor / t.median_us);
    const double copy_us = op.flops > 0 ? 0.0 : CopyUs(t.moved_bytes);
    if (copy_us > 0) std::printf(" %9.2f", copy_us);
    if (meter_) {
      const Sustained s = timer_.Sustain(op, workspace, *meter_, options_.sustained);
      if (copy_us <= 0) std::printf(" %9s", "");
      std::printf(" %9.2f %9.2f %9.0f %9.0f", s.us, s.millijoules, s.watts, s.megahertz);
      row["sustained"] = ToJson(s);
    }
    std::printf("\n");
    std::fflush(stdout);

    row.update({{"calls_pre_norm", op.calls_pre_norm},
                {"calls_post_norm", op.calls_post_norm},
                {"us", {{"median", t.median_us}, {"min", t.min_us}, {"max", t.max_us}}},
                {"bytes", t.moved_bytes},
                {"flops", op.flops},
                {"gbs", gbs},
                {"tflops", tflops},
                {"floor_us", floor},
                {"share", floor / t.median_us},
                {"copy_us", copy_us > 0 ? Json(copy_us) : Json()}});
    result_["rows"].push_back(std::move(row));
    return t;
  }

  // What a copy takes that reads and writes `moved_bytes` together; 0 where it failed, for lack of
  // memory say. Larger ones than the ceiling's go at the ceiling's rate.
  double CopyUs(size_t moved_bytes) {
    constexpr size_t kLargest = size_t{1} << 30;
    if (moved_bytes > kLargest) return static_cast<double>(moved_bytes) / ceilings_.bytes * 1e6;
    if (const auto known = copy_us_.find(moved_bytes); known != copy_us_.end())
      return known->second;
    try {
      const auto bytes = static_cast<int64_t>((moved_bytes + 7) / 8 * 4);  // a side's, in fp32
      return copy_us_[moved_bytes] = timer_.Time(CopyCeiling(bytes), Workspace{}).median_us;
    } catch (const std::exception&) {
      return 0.0;
    }
  }

  void PrintSum(const char* order, const LayerSum& sum, bool pre_norm, int64_t layers) {
    if (!sum.complete) return;
    std::printf(
        "one layer's forward+backward, %s: sum %.1f us, floor %.1f us (%.0f%%); %ld layers "
        "%.2f ms\n",
        order, sum.us, sum.floor_us, 100 * sum.floor_us / sum.us, static_cast<long>(layers),
        sum.us * static_cast<double>(layers) * 1e-3);
    Json row = shape_;
    row.update({{"pre_layer_norm", pre_norm},
                {"us", sum.us},
                {"floor_us", sum.floor_us},
                {"share", sum.floor_us / sum.us}});
    result_["layer_sums"].push_back(std::move(row));
  }

  // After every shape: a run that is cut off keeps what it has.
  void WriteJson() const {
    if (options_.json.empty()) return;
    std::ofstream file(options_.json);
    file << result_.dump(2) << '\n';
    if (!file.flush()) throw std::runtime_error("cannot write " + options_.json);
  }

  Options options_;
  std::regex wanted_;
  Device device_;
  OpTimer timer_;
  std::optional<PowerMeter> meter_;
  Ceilings ceilings_;
  std::map<size_t, double> copy_us_;  // by the bytes that are moved
  Json shape_, result_;
};

int Main(int argc, char** argv) {
  Options o;
  CLI::App app{"Times every op of a layer by itself against this device's product and copy rates."};
  app.option_defaults()->always_capture_default();
  app.add_option("--device", o.device, "cpu or cuda:N");
  app.add_option("--shapes", o.shapes, "B,S,H,A,I[,L];...");
  app.add_option("--dtype", o.dtypes, "fp32, bf16, fp16, or several with commas");
  app.add_option("--dropout", o.dropout, "of all three places")->check(CLI::Range(0.0, 0.99));
  app.add_option("--layers", o.layers,
                 "whose parameters the optimizers' ops go over, where a shape has no L")
      ->check(CLI::PositiveNumber);
  app.add_option("--reps", o.repetitions, "how often each op is timed")->check(CLI::PositiveNumber);
  app.add_option("--json", o.json, "write the figures here too");
  app.add_option("--sustained", o.sustained,
                 "also call each op for so many seconds on end, for its energy and its time at the "
                 "card's power limit")
      ->check(CLI::Range(0.0, 60.0));
  app.add_flag("--unordered", o.unordered, "also with sums over tokens in any order");
  app.add_option("--ops", o.ops, "a regular expression: only ops with such a name");
  CLI11_PARSE(app, argc, argv);
  try {
    Bench(o).Run();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "kernel_bench: %s\n", error.what());
    return 1;
  }
  return 0;
}

}  // namespace
}  // namespace lamina::bench

int main(int argc, char** argv) { return lamina::bench::Main(argc, argv); }
