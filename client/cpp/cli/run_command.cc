// lamina run: an evaluation Forward over .npy files.
#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "cli/commands.h"
#include "cli/describe.h"
#include "cli/npy.h"
#include "nlohmann/json.hpp"

namespace lamina::cli {
namespace {

using client::DType;
using client::Tensor;

// "2:4" -> [2, 4).
absl::StatusOr<client::LayerRange> ParseLayers(const std::string& text) {
  client::LayerRange range;
  const char* end = text.data() + text.size();
  const auto first = std::from_chars(text.data(), end, range.begin);
  if (first.ec == std::errc() && first.ptr != end && *first.ptr == ':') {
    const auto last = std::from_chars(first.ptr + 1, end, range.end);
    if (last.ec == std::errc() && last.ptr == end) return range;
  }
  return absl::InvalidArgumentError(
      absl::StrCat("--layers '", text, "': expected BEGIN:END, as 0:2 for the first two"));
}

absl::Status About(const char* option, const std::string& path, const absl::Status& status) {
  return absl::Status(status.code(), absl::StrCat(option, " '", path, "' ", status.message()));
}

absl::StatusOr<Tensor> FloatTensor(const char* option, const std::string& path,
                                   const client::Session& session, DType dtype) {
  const absl::StatusOr<NpyArray> array = ReadNpy(path);
  if (!array.ok())
    return absl::Status(array.status().code(), absl::StrCat(option, " ", array.status().message()));
  const absl::StatusOr<std::vector<float>> values = array->ToFloats();
  if (!values.ok()) return About(option, path, values.status());
  absl::StatusOr<Tensor> tensor = session.NewTensor(dtype, array->shape);
  if (!tensor.ok()) return About(option, path, tensor.status());
  if (absl::Status status = tensor->CopyFrom(*values); !status.ok()) return status;
  return tensor;
}

absl::StatusOr<Tensor> IntTensor(const char* option, const std::string& path,
                                 const client::Session& session) {
  const absl::StatusOr<NpyArray> array = ReadNpy(path);
  if (!array.ok())
    return absl::Status(array.status().code(), absl::StrCat(option, " ", array.status().message()));
  const absl::StatusOr<std::vector<int32_t>> values = array->ToInts();
  if (!values.ok()) return About(option, path, values.status());
  absl::StatusOr<Tensor> tensor = session.NewTensor(DType::kInt32, array->shape);
  if (!tensor.ok()) return About(option, path, tensor.status());
  std::copy(values->begin(), values->end(), tensor->ints().begin());
  return tensor;
}

// fp16 stays fp16; NumPy has no bf16, so that becomes fp32.
absl::Status WriteTensor(const std::string& path, const Tensor& tensor,
                         const std::vector<float>& values) {
  NpyArray array{.type = NpyArray::Type::kFloat32, .shape = tensor.shape()};
  if (tensor.dtype() == DType::kFloat16) {
    array.type = NpyArray::Type::kFloat16;
    array.data.assign(static_cast<const char*>(tensor.data()), tensor.bytes());
  } else {
    array.data.assign(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(float));
  }
  return WriteNpy(path, array);
}

struct Summary {
  double minimum = 0, maximum = 0, mean = 0, deviation = 0;
  int64_t not_finite = 0;
};

// Of the finite values.
Summary Summarize(const std::vector<float>& values) {
  Summary summary;
  double sum = 0, squares = 0;
  int64_t count = 0;
  for (const float value : values) {
    if (!std::isfinite(value)) {
      ++summary.not_finite;
      continue;
    }
    summary.minimum = count == 0 ? value : std::min(summary.minimum, double{value});
    summary.maximum = count == 0 ? value : std::max(summary.maximum, double{value});
    sum += value;
    squares += double{value} * value;
    ++count;
  }
  if (count > 0) {
    summary.mean = sum / static_cast<double>(count);
    summary.deviation = std::sqrt(
        std::max(0.0, squares / static_cast<double>(count) - summary.mean * summary.mean));
  }
  return summary;
}

}  // namespace

int Run(const GlobalOptions& options, const RunOptions& run) {
  client::ForwardOptions forward{.training = false};
  if (!run.layers.empty()) {
    const absl::StatusOr<client::LayerRange> layers = ParseLayers(run.layers);
    if (!layers.ok()) return FailUsage(options, std::string(layers.status().message()));
    forward.layers = *layers;
  }
  return WithClient(options, [&](const client::Client& daemon) -> int {
    const absl::StatusOr<client::Session> session =
        daemon.OpenSession({.client_name = "lamina run"});
    if (!session.ok()) return Fail(options, session.status());
    const absl::StatusOr<client::Stack> stack = session->OpenStack(run.stack);
    if (!stack.ok()) return Fail(options, stack.status());
    const DType dtype = stack->config().dtype;

    const auto refused = [&options](const absl::Status& status) {
      // Files are arguments; the rest is the daemon's.
      return status.code() == absl::StatusCode::kInvalidArgument
                 ? FailUsage(options, std::string(status.message()))
                 : Fail(options, status);
    };
    const absl::StatusOr<Tensor> input = FloatTensor("--input", run.input_file, *session, dtype);
    if (!input.ok()) return refused(input.status());
    if (!run.mask_file.empty()) {
      const absl::StatusOr<Tensor> mask =
          FloatTensor("--mask", run.mask_file, *session, DType::kFloat32);
      if (!mask.ok()) return refused(mask.status());
      forward.mask = *mask;
    }
    if (!run.lengths_file.empty()) {
      const absl::StatusOr<Tensor> lengths = IntTensor("--lengths", run.lengths_file, *session);
      if (!lengths.ok()) return refused(lengths.status());
      forward.lengths = *lengths;
    }
    absl::StatusOr<Tensor> output = session->NewTensor(dtype, input->shape());
    if (!output.ok()) return Fail(options, output.status());
    forward.output = *output;

    const absl::StatusOr<client::ForwardResult> result = stack->Forward(*input, forward);
    if (!result.ok()) return Fail(options, result.status());
    const absl::StatusOr<std::vector<float>> values = result->output.ToFloats();
    if (!values.ok()) return Fail(options, values.status());
    if (!run.output_file.empty()) {
      if (absl::Status status = WriteTensor(run.output_file, result->output, *values);
          !status.ok()) {
        return Fail(options, status);
      }
    }
    const Summary summary = Summarize(*values);
    const char* file_dtype = dtype == DType::kFloat16 ? "fp16" : "fp32";
    if (options.json) {
      PrintJson(
          nlohmann::json{{"stack", run.stack},
                         {"dtype", client::Name(dtype)},
                         {"shape", result->output.shape()},
                         {"output_file", run.output_file.empty() ? nlohmann::json()
                                                                 : nlohmann::json(run.output_file)},
                         {"min", summary.minimum},
                         {"max", summary.maximum},
                         {"mean", summary.mean},
                         {"std", summary.deviation},
                         {"not_finite", summary.not_finite},
                         {"timing", ToJson(result->timing)},
                         {"input_transport", client::Name(result->input_transport)},
                         {"output_transport", client::Name(result->output_transport)}});
      return kOk;
    }
    char numbers[128];
    std::snprintf(numbers, sizeof(numbers), "min %.6g, max %.6g, mean %.6g, std %.6g",
                  summary.minimum, summary.maximum, summary.mean, summary.deviation);
    PrintText(
        Lines({{"output",
                absl::StrCat(client::Name(dtype), " ", client::ToString(result->output.shape()))},
               {"values",
                absl::StrCat(numbers, summary.not_finite == 0
                                          ? ""
                                          : absl::StrCat(", ", summary.not_finite, " not finite"))},
               {"time", TimingText(result->timing)},
               {"transport", absl::StrCat("input ", client::Name(result->input_transport),
                                          ", output ", client::Name(result->output_transport))},
               {"written", run.output_file.empty()
                               ? "no; name a file with --output-file"
                               : absl::StrCat(run.output_file, " (", file_dtype, ")")}}));
    return kOk;
  });
}

}  // namespace lamina::cli
