#include "engine_rig.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <limits>
#include <stdexcept>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "lamina/kernels/philox.h"

namespace lamina::testing {

TemporaryFolder::TemporaryFolder() {
  std::string pattern = ::testing::TempDir() + "/engine_tests_XXXXXX";
  if (mkdtemp(pattern.data()) == nullptr) throw std::runtime_error("mkdtemp");
  path_ = pattern;
}
TemporaryFolder::~TemporaryFolder() {
  std::error_code ignored;
  std::filesystem::remove_all(path_, ignored);
}
std::vector<std::string> TemporaryFolder::Files() const {
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(path_))
    names.push_back(entry.path().filename().string());
  std::sort(names.begin(), names.end());
  return names;
}

StackConfig TinyConfig(DType dtype) {
  StackConfig c;
  c.batch_size = 3;
  c.max_seq_length = 8;
  c.hidden_size = 16;
  c.intermediate_size = 32;
  c.heads = 2;
  c.num_hidden_layers = 2;
  c.attn_dropout_ratio = 0.1;
  c.hidden_dropout_ratio = 0.1;
  c.seed = 7;
  c.dtype = dtype;
  c.max_contexts = 2;
  return c;
}

std::vector<char> NoiseBytes(uint64_t seed, int64_t count, DType dtype) {
  std::vector<char> bytes(static_cast<size_t>(count) * SizeOf(dtype));
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t counter[4] = {static_cast<uint32_t>(i), 0, 0, 0};
    const Philox4 bits = Philox4x32<10>(counter, static_cast<uint32_t>(seed), 0x5eed);
    const float value = (static_cast<float>(bits.word[0] >> 8) + 0.5f) / 8388608.0f - 1.0f;
    char* const at = bytes.data() + static_cast<size_t>(i) * SizeOf(dtype);
    uint32_t word = 0;
    std::memcpy(&word, &value, sizeof(word));
    if (dtype == DType::kF32) {
      std::memcpy(at, &word, 4);
    } else if (dtype == DType::kBF16) {
      const auto half = static_cast<uint16_t>(word >> 16);  // truncated: still a number in (-1, 1)
      std::memcpy(at, &half, 2);
    } else {
      // fp16 of magnitude in [2^-9, 1): sign, a small exponent, ten bits of noise.
      const auto half = static_cast<uint16_t>(
          (bits.word[1] & 0x8000u) | ((6u + bits.word[2] % 9u) << 10) | (bits.word[3] & 0x3FFu));
      std::memcpy(at, &half, 2);
    }
  }
  return bytes;
}

OwnedTensor Noise(uint64_t seed, DType dtype, const Shape& shape) {
  return OwnedTensor{NoiseBytes(seed, shape.elements(), dtype), dtype, shape};
}

OwnedTensor Zeros(DType dtype, const Shape& shape) {
  return OwnedTensor{std::vector<char>(static_cast<size_t>(shape.elements()) * SizeOf(dtype)),
                     dtype, shape};
}

OwnedTensor Integers(const std::vector<int32_t>& values) {
  OwnedTensor tensor = Zeros(DType::kI32, {static_cast<int64_t>(values.size())});
  std::memcpy(tensor.bytes.data(), values.data(), tensor.bytes.size());
  return tensor;
}

std::vector<double> ToDoubles(absl::string_view bytes, DType dtype) {
  std::vector<double> values(bytes.size() / SizeOf(dtype));
  for (size_t i = 0; i < values.size(); ++i) {
    uint32_t word = 0;
    std::memcpy(&word, bytes.data() + i * SizeOf(dtype), SizeOf(dtype));
    if (dtype == DType::kF16) {
      const int exponent = static_cast<int>(word >> 10 & 0x1F);
      const double fraction = static_cast<double>(word & 0x3FF) / 1024.0;
      const double magnitude = exponent == 31 ? std::numeric_limits<double>::infinity()
                                              : std::ldexp((exponent > 0 ? 1.0 : 0.0) + fraction,
                                                           std::max(exponent, 1) - 15);
      values[i] = (word & 0x8000) != 0 ? -magnitude : magnitude;
      continue;
    }
    if (dtype == DType::kBF16) word <<= 16;
    float value = 0;
    std::memcpy(&value, &word, sizeof(value));
    values[i] = value;
  }
  return values;
}

double RelativeError(const std::vector<double>& a, const std::vector<double>& b) {
  if (a.size() != b.size() || a.empty()) throw std::runtime_error("RelativeError: sizes");
  double difference = 0, norm = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    difference += (a[i] - b[i]) * (a[i] - b[i]);
    norm += b[i] * b[i];
  }
  return std::sqrt(difference / norm);
}

Rig::Rig(const RigOptions& options)
    : metrics_({.version = "0", .commit = "", .backend = "cpu", .device = "test"}) {
  // One thread: the same bits everywhere, and nothing that a thread checker can't see.
  auto backend = std::make_unique<CountingBackend>(Value(Backend::Create("cpu", 1)));
  backend->set_host_memory(options.host_memory);
  backend_ = backend.get();
  engine_ = Value(Engine::Create(std::move(backend), &metrics_,
                                 {.checkpoint_dir = options.checkpoint_dir,
                                  .queue_capacity = options.queue_capacity,
                                  .inline_cap_bytes = options.inline_cap_bytes}));
}

void Rig::Create(const std::string& name, const StackConfig& config) {
  Value(engine_->CreateStack(name, config, {}));
}

std::string Rig::Forward(const std::string& stack, SessionKey session, uint64_t seed, int64_t batch,
                         int64_t seq) {
  const StackConfig config = Value(engine_->GetStack(stack)).config;
  OwnedTensor input = Noise(seed, config.dtype, {batch, seq, config.hidden_size});
  return Value(engine_->Forward({.stack = stack, .session = session, .input = input.view()}, {}))
      .context_id;
}

std::string Rig::ForwardBackward(const std::string& stack, SessionKey session, uint64_t seed) {
  const StackConfig config = Value(engine_->GetStack(stack)).config;
  const Shape shape{config.batch_size, config.max_seq_length, config.hidden_size};
  OwnedTensor input = Noise(seed, config.dtype, shape);
  OwnedTensor grad = Noise(seed + 1000, config.dtype, shape);
  ForwardOutcome forward =
      Value(engine_->Forward({.stack = stack, .session = session, .input = input.view()}, {}));
  BackwardOutcome backward = Value(engine_->Backward({.stack = stack,
                                                      .session = session,
                                                      .context_id = forward.context_id,
                                                      .output_grad = grad.view(),
                                                      .want_input_grad = true},
                                                     {}));
  return forward.inline_output + backward.inline_input_grad;
}

std::string Rig::Step(const std::string& stack, SessionKey session, uint64_t seed) {
  std::string bytes = ForwardBackward(stack, session, seed);
  bytes += ForwardBackward(stack, session, seed + 1);
  const ApplyOutcome apply = Value(engine_->ApplyGradients(
      stack, {.learning_rate = 1e-2, .weight_decay = 0.01, .max_grad_norm = 1.0}, true, {}));
  return absl::StrCat(bytes, apply.result.applied, " ", apply.result.step, " ",
                      apply.result.grad_norm);
}

std::string Rig::Gradients(const std::string& stack) {
  const StackInfo info = Value(engine_->GetStack(stack));
  std::string bytes(static_cast<size_t>(info.parameter_count) * sizeof(float), '\0');
  const absl::Status read =
      engine_->ReadParameters(stack, {}, DType::kF32, true, bytes.data(), bytes.size(), {});
  if (!read.ok()) throw std::runtime_error(read.ToString());
  return bytes;
}

std::string Rig::Snapshot(const std::string& stack) {
  const StackInfo info = Value(engine_->GetStack(stack));
  std::string bytes(static_cast<size_t>(info.parameter_count) * sizeof(float), '\0');
  std::string all;
  for (const bool gradients : {false, true}) {
    if (gradients && !info.config.training) continue;
    const absl::Status read =
        engine_->ReadParameters(stack, {}, DType::kF32, gradients, bytes.data(), bytes.size(), {});
    if (!read.ok()) throw std::runtime_error(read.ToString());
    all += bytes;
  }
  return absl::StrCat(
      all, ToJson(info.config), info.counters.optimizer_step, " ", info.counters.rng_counter, " ",
      info.counters.skipped_steps, " ", info.counters.loss_scale, " ", info.counters.clean_steps,
      " ", info.counters.overflows_tolerated, " ", info.loss_scale, " ", info.outstanding_contexts);
}

double Rig::Metric(const std::string& line) {
  for (absl::string_view text : absl::StrSplit(metrics_.Text(), '\n')) {
    if (!absl::StartsWith(text, line + " ")) continue;
    double value = 0;
    if (absl::SimpleAtod(text.substr(line.size() + 1), &value)) return value;
  }
  return std::numeric_limits<double>::quiet_NaN();
}

Blocker::Blocker(Engine& engine) {
  thread_ = std::thread([this, &engine] {
    const CallControl control{.cancelled = [this] {
      std::unique_lock<std::mutex> lock(mutex_);
      begun_ = true;
      changed_.notify_all();
      changed_.wait(lock, [this] { return released_; });
      return true;
    }};
    EXPECT_EQ(engine.ZeroGradients("none", control).code(), absl::StatusCode::kCancelled);
  });
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait(lock, [this] { return begun_; });
}

void Blocker::Release() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    released_ = true;
    changed_.notify_all();
  }
  if (thread_.joinable()) thread_.join();
}

}  // namespace lamina::testing
