// What the benchmarks' programs share: device memory with noise in it, and failures that end the
// program. A zeros-filled operand would flatter a GPU, whose clock depends on the bits that flip.
#pragma once

#include <cstddef>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "lamina/kernels/backend.h"

namespace lamina::bench {

inline void Check(const absl::Status& status) {
  if (!status.ok()) throw std::runtime_error(status.ToString());
}

template <typename T>
T Value(absl::StatusOr<T> value) {
  Check(value.status());
  return *std::move(value);
}

// "fp32", "bf16" or "fp16".
DType ParseDType(const std::string& name);

// A backend, and noise in its memory to fill tensors from.
class Device {
 public:
  explicit Device(const std::string& name);  // "cpu" or "cuda:N"
  ~Device();
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  Backend& backend() { return *backend_; }
  bool is_gpu() const { return !backend_->info().host_memory; }
  // Values in (-1, 1); a long tensor repeats them. `view`: fp32, bf16 or fp16.
  void FillWithNoise(const TensorView& view);

 private:
  std::unique_ptr<Backend> backend_;
  TensorView noise_;  // fp32 [kNoise]
};

// Tensors that live as long as this object.
class Tensors {
 public:
  explicit Tensors(Device& device) : device_(&device) {}
  Tensors(Tensors&&) = default;
  ~Tensors();

  TensorView Noise(DType dtype, const Shape& shape);
  TensorView Zeros(DType dtype, const Shape& shape);
  template <typename T>
  T* Copy(const std::vector<T>& values) {
    const TensorView bytes = Zeros(DType::kU8, {static_cast<int64_t>(values.size() * sizeof(T))});
    Check(device_->backend().CopyIn(bytes.data, values.data(), bytes.bytes()));
    Check(device_->backend().Synchronize());  // `values` may go
    return static_cast<T*>(bytes.data);
  }

  size_t bytes() const { return bytes_; }
  Device& device() { return *device_; }

 private:
  TensorView Allocate(DType dtype, const Shape& shape);

  Device* device_;
  std::vector<void*> allocated_;
  size_t bytes_ = 0;
};

}  // namespace lamina::bench
