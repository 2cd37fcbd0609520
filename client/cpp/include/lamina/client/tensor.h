// A dense row-major tensor in host memory: in a region that the daemon maps too, or in memory of
// this process alone.
//
// A Tensor is a cheap handle: copies share the elements. The memory lives while a Tensor (or the
// Region it was taken from) refers to it, also beyond its session; but after the session's end the
// daemon no longer knows the region and calls that name it fail.
//
// Threads: a handle is a value; the elements are yours to guard. While a call is running the daemon
// reads its inputs and writes its outputs, so leave those alone until it has returned.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "lamina/client/types.h"

namespace lamina::client {

namespace internal {
class Storage;
}

class Tensor {
 public:
  // No tensor: false, no elements.
  Tensor() = default;

  // Zeroed memory of this process. It travels inside the messages, up to the daemon's inline cap.
  // INVALID_ARGUMENT: an extent < 1, more than four of them, or a size that overflows.
  static absl::StatusOr<Tensor> Allocate(DType dtype, Shape shape);
  // Memory of the caller's, which must outlive every copy; travels as Allocate's.
  // INVALID_ARGUMENT also for a null or misaligned pointer.
  static absl::StatusOr<Tensor> Wrap(void* data, DType dtype, Shape shape);

  explicit operator bool() const { return storage_ != nullptr; }
  DType dtype() const { return dtype_; }
  const Shape& shape() const { return shape_; }
  size_t size() const { return size_; }  // elements
  size_t bytes() const { return size_ * SizeOf(dtype_); }
  void* data() const { return data_; }
  // Whether the elements are in a region, so that calls carry a handle instead of the elements.
  bool in_region() const;

  // The elements of an fp32 or an int32 tensor. Any other dtype is a bug of the caller's: prints
  // what was wrong and aborts.
  std::span<float> floats() const;
  std::span<int32_t> ints() const;

  // Converts from or to fp32, whatever the floating dtype; rounds to nearest even.
  // INVALID_ARGUMENT: another number of elements, or an int32 tensor.
  absl::Status CopyFrom(std::span<const float> values) const;
  absl::StatusOr<std::vector<float>> ToFloats() const;

  // The same elements under another shape. INVALID_ARGUMENT: another number of elements.
  absl::StatusOr<Tensor> Reshape(Shape shape) const;
  // Another view of the same memory that begins `offset_bytes` after this one's start.
  // INVALID_ARGUMENT: it does not lie within this one, or its offset is misaligned.
  absl::StatusOr<Tensor> View(DType dtype, Shape shape, size_t offset_bytes) const;

 private:
  friend class internal::Storage;
  std::shared_ptr<internal::Storage> storage_;
  void* data_ = nullptr;  // into storage_
  DType dtype_ = DType::kFloat32;
  Shape shape_;
  size_t size_ = 0;
};

// A parameter by name, with its values.
struct NamedTensor {
  std::string name;  // "layers.<i>.<name>"
  Tensor tensor;
};

}  // namespace lamina::client
