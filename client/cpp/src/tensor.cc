#include "lamina/client/tensor.h"

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#include "absl/strings/str_cat.h"
#include "src/float16.h"
#include "src/storage.h"

namespace lamina::client {
namespace {

// Cache lines, and what vector loads like.
constexpr size_t kAlignment = 64;

class HeapStorage : public internal::Storage {
 public:
  HeapStorage(void* data, size_t length) : Storage(data, length) {}
  ~HeapStorage() override { std::free(data()); }
};

class BorrowedStorage : public internal::Storage {
 public:
  BorrowedStorage(void* data, size_t length) : Storage(data, length) {}
};

[[noreturn]] void WrongDType(const char* call, DType dtype, bool present) {
  std::fprintf(stderr, "lamina::client::Tensor::%s: the tensor is %s\n", call,
               present ? Name(dtype) : "absent");
  std::abort();
}

}  // namespace

namespace internal {

absl::StatusOr<size_t> BytesOf(DType dtype, const Shape& shape) {
  if (shape.empty() || shape.size() > 4) {
    return absl::InvalidArgumentError(absl::StrCat("shape ", ToString(shape), " has ", shape.size(),
                                                   " extents; 1..4 are allowed"));
  }
  const size_t element = SizeOf(dtype);
  if (element == 0) return absl::InvalidArgumentError("unknown dtype");
  size_t bytes = element;
  for (const int64_t extent : shape) {
    if (extent < 1) {
      return absl::InvalidArgumentError(
          absl::StrCat("shape ", ToString(shape), ": every extent must be >= 1"));
    }
    if (__builtin_mul_overflow(bytes, static_cast<size_t>(extent), &bytes) ||
        bytes > static_cast<size_t>(INT64_MAX)) {
      return absl::InvalidArgumentError(
          absl::StrCat("shape ", ToString(shape), ": the size overflows 63 bits"));
    }
  }
  return bytes;
}

absl::StatusOr<Tensor> Storage::View(std::shared_ptr<Storage> storage, DType dtype, Shape shape,
                                     size_t offset_bytes) {
  if (storage == nullptr) return absl::InvalidArgumentError("a view of no memory");
  absl::StatusOr<size_t> bytes = BytesOf(dtype, shape);
  if (!bytes.ok()) return bytes.status();
  if (*bytes > storage->length() || offset_bytes > storage->length() - *bytes) {
    return absl::InvalidArgumentError(absl::StrCat("a view of ", *bytes, " bytes at offset ",
                                                   offset_bytes, " does not lie within ",
                                                   storage->length(), " bytes"));
  }
  std::byte* data = storage->data() + offset_bytes;
  if (reinterpret_cast<uintptr_t>(data) % SizeOf(dtype) != 0) {
    return absl::InvalidArgumentError(absl::StrCat("a view of ", Name(dtype), " at offset ",
                                                   offset_bytes, " is not aligned to ",
                                                   SizeOf(dtype), " bytes"));
  }
  Tensor tensor;
  tensor.storage_ = std::move(storage);
  tensor.data_ = data;
  tensor.dtype_ = dtype;
  tensor.shape_ = std::move(shape);
  tensor.size_ = *bytes / SizeOf(dtype);
  return tensor;
}

size_t Storage::OffsetOf(const Tensor& tensor) {
  return static_cast<size_t>(static_cast<std::byte*>(tensor.data_) - tensor.storage_->data());
}

}  // namespace internal

absl::StatusOr<Tensor> Tensor::Allocate(DType dtype, Shape shape) {
  absl::StatusOr<size_t> bytes = internal::BytesOf(dtype, shape);
  if (!bytes.ok()) return bytes.status();
  const size_t rounded = (*bytes + kAlignment - 1) / kAlignment * kAlignment;
  void* data = std::aligned_alloc(kAlignment, rounded);
  if (data == nullptr) {
    return absl::ResourceExhaustedError(absl::StrCat("no memory for ", *bytes, " bytes"));
  }
  std::memset(data, 0, rounded);
  return internal::Storage::View(std::make_shared<HeapStorage>(data, *bytes), dtype,
                                 std::move(shape), 0);
}

absl::StatusOr<Tensor> Tensor::Wrap(void* data, DType dtype, Shape shape) {
  if (data == nullptr) return absl::InvalidArgumentError("Wrap: data is null");
  absl::StatusOr<size_t> bytes = internal::BytesOf(dtype, shape);
  if (!bytes.ok()) return bytes.status();
  return internal::Storage::View(std::make_shared<BorrowedStorage>(data, *bytes), dtype,
                                 std::move(shape), 0);
}

bool Tensor::in_region() const { return storage_ != nullptr && !storage_->region_id().empty(); }

std::span<float> Tensor::floats() const {
  if (storage_ == nullptr || dtype_ != DType::kFloat32) {
    WrongDType("floats", dtype_, storage_ != nullptr);
  }
  return {static_cast<float*>(data_), size_};
}

std::span<int32_t> Tensor::ints() const {
  if (storage_ == nullptr || dtype_ != DType::kInt32) {
    WrongDType("ints", dtype_, storage_ != nullptr);
  }
  return {static_cast<int32_t*>(data_), size_};
}

absl::Status Tensor::CopyFrom(std::span<const float> values) const {
  if (values.size() != size_) {
    return absl::InvalidArgumentError(absl::StrCat(values.size(), " values for a tensor ",
                                                   ToString(shape_), " of ", size_, " elements"));
  }
  switch (dtype_) {
    case DType::kFloat32:
      std::memcpy(data_, values.data(), bytes());
      return absl::OkStatus();
    case DType::kBFloat16:
      for (size_t i = 0; i < size_; ++i) {
        static_cast<uint16_t*>(data_)[i] = internal::BFloat16FromFloat(values[i]);
      }
      return absl::OkStatus();
    case DType::kFloat16:
      for (size_t i = 0; i < size_; ++i) {
        static_cast<uint16_t*>(data_)[i] = internal::Float16FromFloat(values[i]);
      }
      return absl::OkStatus();
    case DType::kInt32:
      break;
  }
  return absl::InvalidArgumentError("CopyFrom: an int32 tensor takes no floats");
}

absl::StatusOr<std::vector<float>> Tensor::ToFloats() const {
  std::vector<float> values(size_);
  switch (dtype_) {
    case DType::kFloat32:
      if (size_ > 0) std::memcpy(values.data(), data_, bytes());
      return values;
    case DType::kBFloat16:
      for (size_t i = 0; i < size_; ++i) {
        values[i] = internal::FloatFromBFloat16(static_cast<const uint16_t*>(data_)[i]);
      }
      return values;
    case DType::kFloat16:
      for (size_t i = 0; i < size_; ++i) {
        values[i] = internal::FloatFromFloat16(static_cast<const uint16_t*>(data_)[i]);
      }
      return values;
    case DType::kInt32:
      break;
  }
  return absl::InvalidArgumentError("ToFloats: an int32 tensor has no floats");
}

absl::StatusOr<Tensor> Tensor::Reshape(Shape shape) const {
  absl::StatusOr<size_t> wanted = internal::BytesOf(dtype_, shape);
  if (!wanted.ok()) return wanted.status();
  if (*wanted != bytes()) {
    return absl::InvalidArgumentError(absl::StrCat("a tensor ", ToString(shape_), " of ", size_,
                                                   " elements cannot become ", ToString(shape)));
  }
  Tensor tensor = *this;
  tensor.shape_ = std::move(shape);
  return tensor;
}

absl::StatusOr<Tensor> Tensor::View(DType dtype, Shape shape, size_t offset_bytes) const {
  absl::StatusOr<size_t> wanted = internal::BytesOf(dtype, shape);
  if (!wanted.ok()) return wanted.status();
  if (*wanted > bytes() || offset_bytes > bytes() - *wanted) {
    return absl::InvalidArgumentError(
        absl::StrCat("a view of ", *wanted, " bytes at offset ", offset_bytes,
                     " does not lie within a tensor of ", bytes(), " bytes"));
  }
  return internal::Storage::View(storage_, dtype, std::move(shape),
                                 internal::Storage::OffsetOf(*this) + offset_bytes);
}

}  // namespace lamina::client
