#include "rig.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>

#include "absl/strings/str_cat.h"

namespace lamina::testing {
namespace {

void Check(const absl::Status& status) {
  if (!status.ok()) throw std::runtime_error(status.ToString());
}

}  // namespace

std::unique_ptr<Backend> OpenDevice(const char* device, std::string* reason) {
  absl::StatusOr<std::unique_ptr<Backend>> backend = Backend::Create(device);
  if (backend.ok()) return *std::move(backend);
  *reason = absl::StrCat("no ", device, ": ", backend.status().ToString());
  // Anything else than "there is none" is a failure, not a reason to skip.
  if (backend.status().code() != absl::StatusCode::kUnimplemented &&
      backend.status().code() != absl::StatusCode::kNotFound)
    throw std::runtime_error(*reason);
  return nullptr;
}

void DeviceTest::SetUp() {
  std::string reason;
  backend_ = OpenDevice(GetParam(), &reason);
  if (backend_ == nullptr) GTEST_SKIP() << reason;
}

std::string DeviceName(const ::testing::TestParamInfo<const char*>& info) {
  return std::string(info.param) == "cpu" ? "cpu" : "cuda";
}

DeviceTensor::DeviceTensor(Backend& backend, DType dtype, const Shape& shape)
    : backend_(&backend), view_{nullptr, dtype, shape} {
  view_.data = Value(backend.Allocate(view_.bytes()));
  const std::vector<uint8_t> poison(view_.bytes(), 0xFF);  // NaN in every float type
  Check(backend.CopyIn(view_.data, poison.data(), poison.size()));
  Check(backend.Synchronize());
}

DeviceTensor::DeviceTensor(Backend& backend, DType dtype, const Shape& shape,
                           const std::vector<float>& values)
    : DeviceTensor(backend, dtype, shape) {
  if (static_cast<int64_t>(values.size()) != shape.elements())
    throw std::runtime_error("DeviceTensor: values do not fit the shape");
  if (dtype == DType::kF32) {
    Check(backend.CopyIn(view_.data, values.data(), view_.bytes()));
  } else {
    const DeviceTensor wide(backend, DType::kF32, shape, values);
    Check(backend.Cast(Workspace{}, {.src = wide.view(), .dst = view_}));
    Check(backend.Synchronize());
  }
  Check(backend.Synchronize());
}

DeviceTensor::DeviceTensor(Backend& backend, const std::vector<int32_t>& values)
    : DeviceTensor(backend, DType::kI32, {static_cast<int64_t>(values.size())}) {
  Check(backend.CopyIn(view_.data, values.data(), view_.bytes()));
  Check(backend.Synchronize());
}

DeviceTensor::~DeviceTensor() {
  if (view_) backend_->Free(view_.data);
}

std::vector<float> DeviceTensor::Floats() const {
  std::vector<float> values(static_cast<size_t>(view_.elements()));
  if (view_.dtype == DType::kF32) {
    Check(backend_->CopyOut(values.data(), view_.data, view_.bytes()));
    Check(backend_->Synchronize());
    return values;
  }
  const DeviceTensor wide(*backend_, DType::kF32, view_.shape);
  Check(backend_->Cast(Workspace{}, {.src = view_, .dst = wide.view()}));
  return wide.Floats();
}

std::vector<uint8_t> DeviceTensor::Bytes() const {
  std::vector<uint8_t> bytes(view_.bytes());
  Check(backend_->CopyOut(bytes.data(), view_.data, bytes.size()));
  Check(backend_->Synchronize());
  return bytes;
}

size_t Allocated(const MemoryPlan& plan) { return plan.Total() - plan.Bytes(MemoryKind::kGraphs); }

std::vector<float> Noise(uint64_t seed, int64_t count) {
  std::vector<float> values(static_cast<size_t>(count));
  uint64_t state = seed * 0x9E3779B97F4A7C15u + 1;
  for (float& value : values) {
    // splitmix64
    uint64_t z = (state += 0x9E3779B97F4A7C15u);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    z ^= z >> 31;
    value = static_cast<float>(static_cast<double>(z >> 11) * 0x1p-52 - 1.0);
  }
  return values;
}

CallData NoiseCall(const StackConfig& config, int64_t batch, int64_t seq, uint64_t seed) {
  const int64_t count = batch * seq * config.hidden_size;
  return CallData{.batch = batch,
                  .seq = seq,
                  .input = Noise(2 * seed, count),
                  .output_grad = Noise(2 * seed + 1, count)};
}

StackConfig SmallConfig() {
  StackConfig config;
  config.batch_size = 3;
  config.max_seq_length = 7;
  config.hidden_size = 24;
  config.intermediate_size = 40;
  config.heads = 3;
  config.num_hidden_layers = 2;
  config.seed = 11;
  return config;
}

CallData NoisePackedCall(const StackConfig& config, const std::vector<int32_t>& lengths,
                         uint64_t seed) {
  CallData data{.batch = static_cast<int64_t>(lengths.size())};
  data.cu_seqlens.push_back(0);
  for (const int32_t length : lengths) {
    data.cu_seqlens.push_back(data.cu_seqlens.back() + length);
    data.seq = std::max<int64_t>(data.seq, length);
  }
  const int64_t count = data.cu_seqlens.back() * config.hidden_size;
  data.input = Noise(2 * seed, count);
  data.output_grad = Noise(2 * seed + 1, count);
  return data;
}

DeviceCall::DeviceCall(Backend& backend, const StackConfig& config, const CallData& data,
                       LayerRange layers)
    : shape(data.cu_seqlens.empty() ? Shape{data.batch, data.seq, config.hidden_size}
                                    : Shape{data.cu_seqlens.back(), config.hidden_size}),
      input(backend, config.dtype, shape, data.input),
      output(backend, config.dtype, shape),
      args{.layers = layers, .input = input.view(), .output = output.view()} {
  if (!data.mask.empty())
    args.mask =
        optional.emplace_back(backend, DType::kF32, Shape{data.batch, data.seq}, data.mask).view();
  if (!data.lengths.empty()) args.lengths = optional.emplace_back(backend, data.lengths).view();
  if (!data.cu_seqlens.empty()) {
    args.cu_seqlens = optional.emplace_back(backend, data.cu_seqlens).view();
    args.longest = data.seq;
  }
}

std::vector<float> RunEval(Backend& backend, Stack& stack, const CallData& data,
                           LayerRange layers) {
  const DeviceCall call(backend, stack.config(), data, layers);
  Check(stack.ForwardEval(call.args));
  return call.output.Floats();
}

CallResult RunTraining(Backend& backend, Stack& stack, const CallData& data, LayerRange layers) {
  const DeviceCall call(backend, stack.config(), data, layers);
  const std::unique_ptr<Context> context = Value(stack.ForwardTraining(call.args));
  const DeviceTensor dy(backend, stack.config().dtype, call.shape, data.output_grad);
  const DeviceTensor dx(backend, stack.config().dtype, call.shape);
  Check(stack.Backward(*context, dy.view(), dx.view()));
  return CallResult{call.output.Floats(), dx.Floats()};
}

std::vector<float> ReadFloats(Stack& stack, const std::string& name, ParameterPart part) {
  const size_t bytes = Value(stack.ParameterBytes(name, part));
  std::vector<float> values(bytes / sizeof(float));
  Check(stack.ReadParameter(name, part, values.data(), bytes));
  return values;
}

void WriteFloats(Stack& stack, const std::string& name, ParameterPart part,
                 const std::vector<float>& values) {
  Check(stack.WriteParameter(name, part, values.data(), values.size() * sizeof(float)));
}

std::map<std::string, std::vector<float>> ReadAll(Stack& stack, ParameterPart part) {
  std::map<std::string, std::vector<float>> all;
  for (const ParameterInfo& p : stack.parameters()) all[p.name] = ReadFloats(stack, p.name, part);
  return all;
}

void Perturb(Stack& stack, uint64_t seed) {
  for (const ParameterInfo& p : stack.parameters()) {
    std::vector<float> values = ReadFloats(stack, p.name, ParameterPart::kMaster);
    const std::vector<float> noise = Noise(++seed, static_cast<int64_t>(values.size()));
    // Products keep their inputs' size: deviation 1/sqrt(K). Uniform noise has deviation 1/sqrt(3).
    const float scale = p.shape.rank() == 2
                            ? static_cast<float>(std::sqrt(3.0 / static_cast<double>(p.shape[1])))
                            : 0.25f;
    for (size_t i = 0; i < values.size(); ++i)
      values[i] = (p.shape.rank() == 2 ? 0.0f : values[i]) + scale * noise[i];
    WriteFloats(stack, p.name, ParameterPart::kMaster, values);
  }
}

double MaxAbs(const std::vector<float>& values) {
  double largest = 0;
  for (float v : values) largest = std::max(largest, std::abs(static_cast<double>(v)));
  return largest;
}

double MaxAbsDifference(const std::vector<float>& a, const std::vector<float>& b) {
  if (a.size() != b.size()) throw std::runtime_error("sizes differ");
  double largest = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    const double difference = std::abs(static_cast<double>(a[i]) - static_cast<double>(b[i]));
    if (std::isnan(difference)) return std::numeric_limits<double>::infinity();
    largest = std::max(largest, difference);
  }
  return largest;
}

}  // namespace lamina::testing
