#include "device.h"

#include <algorithm>
#include <random>

namespace lamina::bench {
namespace {

constexpr int64_t kNoise = 1 << 20;

}  // namespace

DType ParseDType(const std::string& name) {
  for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF16})
    if (name == Name(dtype)) return dtype;
  throw std::runtime_error("dtype \"" + name + "\" is not fp32, bf16 or fp16");
}

Device::Device(const std::string& name)
    : backend_(Value(Backend::Create(name))), noise_{nullptr, DType::kF32, {kNoise}} {
  std::mt19937 random;
  std::vector<float> values(kNoise);
  for (float& value : values) value = static_cast<float>(random()) * 0x1p-31f - 1.0f;
  noise_.data = Value(backend_->Allocate(noise_.bytes()));
  Check(backend_->CopyIn(noise_.data, values.data(), noise_.bytes()));
  Check(backend_->Synchronize());
}

Device::~Device() { backend_->Free(noise_.data); }

void Device::FillWithNoise(const TensorView& view) {
  const TensorView flat = view.Reshaped({view.elements()});
  for (int64_t begin = 0; begin < flat.elements(); begin += kNoise) {
    const int64_t end = std::min(begin + kNoise, flat.elements());
    Check(backend_->Cast(Workspace{},
                         {.src = noise_.Rows(0, end - begin), .dst = flat.Rows(begin, end)}));
  }
}

Tensors::~Tensors() {
  static_cast<void>(device_->backend().Synchronize());  // a failure has been reported by then
  for (void* data : allocated_) device_->backend().Free(data);
}

TensorView Tensors::Allocate(DType dtype, const Shape& shape) {
  TensorView view{nullptr, dtype, shape};
  view.data = Value(device_->backend().Allocate(view.bytes()));
  allocated_.push_back(view.data);
  bytes_ += view.bytes();
  return view;
}

TensorView Tensors::Noise(DType dtype, const Shape& shape) {
  const TensorView view = Allocate(dtype, shape);
  device_->FillWithNoise(view);
  return view;
}

TensorView Tensors::Zeros(DType dtype, const Shape& shape) {
  const TensorView view = Allocate(dtype, shape);
  Check(device_->backend().SetZero(view.data, view.bytes()));
  return view;
}

}  // namespace lamina::bench
