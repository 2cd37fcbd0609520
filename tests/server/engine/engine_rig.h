// What the tests of this folder share: an engine on a CPU backend that can fail on demand, and the
// tensors of its calls.
#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "server/engine/engine.h"
#include "server/metrics/metrics.h"
#include "tests/support/status.h"
#include "tests/support/wait.h"
#include "tests/transformer/counting_backend.h"

namespace lamina::testing {

// Of tests with one session.
inline constexpr SessionKey kSession = 1;

// A folder of its own, removed with all that is in it.
class TemporaryFolder {
 public:
  TemporaryFolder();
  ~TemporaryFolder();
  const std::string& path() const { return path_; }
  std::vector<std::string> Files() const;  // names, sorted

 private:
  std::string path_;
};

// H 16, A 2, I 32, L 2, B 3, S 8, both dropouts 0.1, seed 7, 2 contexts. Not resolved.
StackConfig TinyConfig(DType dtype = DType::kF32);

// Deterministic values in (-1, 1) in a dtype, as bytes.
std::vector<char> NoiseBytes(uint64_t seed, int64_t count, DType dtype);

// A tensor in memory of its own.
struct OwnedTensor {
  std::vector<char> bytes;
  DType dtype = DType::kF32;
  Shape shape;
  CallTensor view() {
    return CallTensor{
        .data = bytes.data(), .dtype = dtype, .shape = shape, .transport = TensorTransport::kMemfd};
  }
};
OwnedTensor Noise(uint64_t seed, DType dtype, const Shape& shape);
OwnedTensor Zeros(DType dtype, const Shape& shape);
OwnedTensor Integers(const std::vector<int32_t>& values);
// The values of fp32, bf16 or fp16 bytes.
std::vector<double> ToDoubles(absl::string_view bytes, DType dtype);
// ||a - b|| / ||b||, for tolerances.
double RelativeError(const std::vector<double>& a, const std::vector<double>& b);

struct RigOptions {
  bool host_memory = true;  // false: the engine stages every tensor, as on a card
  std::string checkpoint_dir;
  int queue_capacity = 256;
  size_t inline_cap_bytes = size_t{1} << 20;
};

class Rig {
 public:
  explicit Rig(const RigOptions& options = {});

  Engine& engine() { return *engine_; }
  MetricSet& metrics() { return metrics_; }
  CountingBackend& backend() { return *backend_; }  // only while no call is on its way

  void Create(const std::string& name, const StackConfig& config);
  // Noise [B, S, H] in the stack's dtype through a training Forward; the context's id.
  std::string Forward(const std::string& stack, SessionKey session, uint64_t seed,
                      int64_t batch = 3, int64_t seq = 8);
  // All parameters' gradients as fp32 bytes, one after another.
  std::string Gradients(const std::string& stack);
  // Forward, Backward: the output's and the input gradient's bytes.
  std::string ForwardBackward(const std::string& stack, SessionKey session, uint64_t seed);
  // A step: two of these, then AdamW with zeroing. What it gave, as bytes.
  std::string Step(const std::string& stack, SessionKey session, uint64_t seed);
  // Everything of a stack that a client can see: parameters, gradients, counters, contexts.
  std::string Snapshot(const std::string& stack);
  // A metric's value by its line's beginning; NaN where there is none.
  double Metric(const std::string& line);

 private:
  MetricSet metrics_;
  CountingBackend* backend_ = nullptr;
  std::unique_ptr<Engine> engine_;
};

// Keeps the device thread busy from the constructor until Release.
class Blocker {
 public:
  explicit Blocker(Engine& engine);
  ~Blocker() { Release(); }
  void Release();

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool begun_ = false, released_ = false;  // guarded by mutex_
  std::thread thread_;
};

}  // namespace lamina::testing
