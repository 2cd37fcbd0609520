// What the tests of this folder share: devices, tensors on them, a stack with its calls.
#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <limits>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "lamina/kernels/backend.h"
#include "lamina/transformer/stack.h"
#include "support/rounding.h"
#include "support/status.h"

namespace lamina::testing {

inline constexpr DType kDTypes[] = {DType::kF32, DType::kBF16, DType::kF16};
inline constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
inline constexpr double kInf = std::numeric_limits<double>::infinity();

// Creates the device that the parameter names, "cpu" or "cuda:0"; skips the test visibly where
// there is none.
class DeviceTest : public ::testing::TestWithParam<const char*> {
 protected:
  void SetUp() override;
  std::unique_ptr<Backend> backend_;
};
inline const char* const kDevices[] = {"cpu", "cuda:0"};
// Null, and the reason, where there is no such device.
std::unique_ptr<Backend> OpenDevice(const char* device, std::string* reason);
std::string DeviceName(const ::testing::TestParamInfo<const char*>& info);

// Memory of a backend with a view of it.
class DeviceTensor {
 public:
  DeviceTensor(Backend& backend, DType dtype, const Shape& shape);  // contents: NaN bytes
  // `values` rounded to dtype.
  DeviceTensor(Backend& backend, DType dtype, const Shape& shape, const std::vector<float>& values);
  DeviceTensor(Backend& backend, const std::vector<int32_t>& values);
  DeviceTensor(DeviceTensor&& other) noexcept
      : backend_(other.backend_), view_(std::exchange(other.view_, TensorView{})) {}
  DeviceTensor& operator=(DeviceTensor&&) = delete;
  ~DeviceTensor();

  const TensorView& view() const { return view_; }
  std::vector<float> Floats() const;  // as fp32, which is exact
  std::vector<uint8_t> Bytes() const;

 private:
  Backend* backend_;
  TensorView view_;
};

// What of a plan the backend allocates: graphs are the driver's.
size_t Allocated(const MemoryPlan& plan);

// Deterministic values in (-1, 1), the same on every machine.
std::vector<float> Noise(uint64_t seed, int64_t count);

// One call's tensors on the host.
struct CallData {
  int64_t batch = 0, seq = 0;
  std::vector<float> input, output_grad;  // [B, S, H], or [T, H] where packed
  std::vector<float> mask;                // [B, S] or empty
  std::vector<int32_t> lengths;           // [B] or empty
  std::vector<int32_t> cu_seqlens;        // packed: [batch + 1], and seq is the longest's length
};
CallData NoiseCall(const StackConfig& config, int64_t batch, int64_t seq, uint64_t seed = 1);
// Packed sequences of these lengths.
CallData NoisePackedCall(const StackConfig& config, const std::vector<int32_t>& lengths,
                         uint64_t seed = 1);

// A call's tensors on the device.
struct DeviceCall {
  DeviceCall(Backend& backend, const StackConfig& config, const CallData& data, LayerRange layers);
  Shape shape;
  DeviceTensor input, output;
  std::vector<DeviceTensor> optional;  // the keys' tensor, where there is one
  ForwardArgs args;
};

// What a call gave, on the host.
struct CallResult {
  std::vector<float> output, input_grad;
};

// A small valid config, resolved: H 24, A 3, I 40, L 2, B 3, S 7, no dropout.
StackConfig SmallConfig();

std::vector<float> RunEval(Backend& backend, Stack& stack, const CallData& data, LayerRange layers);
// Forward and Backward.
CallResult RunTraining(Backend& backend, Stack& stack, const CallData& data, LayerRange layers);

std::vector<float> ReadFloats(Stack& stack, const std::string& name, ParameterPart part);
void WriteFloats(Stack& stack, const std::string& name, ParameterPart part,
                 const std::vector<float>& values);
// Every stored parameter's part, by name.
std::map<std::string, std::vector<float>> ReadAll(Stack& stack, ParameterPart part);

// Writes noise around what Create gave into every parameter: biases and gammas away from 0 and 1.
void Perturb(Stack& stack, uint64_t seed);

double MaxAbs(const std::vector<float>& values);
double MaxAbsDifference(const std::vector<float>& a, const std::vector<float>& b);

}  // namespace lamina::testing
