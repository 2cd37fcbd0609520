// What a Tensor's elements lie in. Internal.
#pragma once

#include <cstddef>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "lamina/client/tensor.h"

namespace lamina::client::internal {

// Memory of `length` bytes from `data` on. Its destructor gives it back to wherever it came from.
class Storage {
 public:
  virtual ~Storage() = default;
  Storage(const Storage&) = delete;
  Storage& operator=(const Storage&) = delete;

  std::byte* data() const { return data_; }
  size_t length() const { return length_; }
  // The region's capability and the session that owns it; empty and null for memory of the process.
  const std::string& region_id() const { return region_id_; }
  const void* session() const { return session_; }

  // Checks shape, bounds and alignment; INVALID_ARGUMENT.
  static absl::StatusOr<Tensor> View(std::shared_ptr<Storage> storage, DType dtype, Shape shape,
                                     size_t offset_bytes);
  static const std::shared_ptr<Storage>& Of(const Tensor& tensor) { return tensor.storage_; }
  // Bytes from the storage's start to the tensor's.
  static size_t OffsetOf(const Tensor& tensor);

 protected:
  Storage(void* data, size_t length, std::string region_id = {}, const void* session = nullptr)
      : data_(static_cast<std::byte*>(data)),
        length_(length),
        region_id_(std::move(region_id)),
        session_(session) {}

 private:
  std::byte* data_;
  size_t length_;
  std::string region_id_;
  const void* session_;
};

// Bytes of a dense tensor. INVALID_ARGUMENT: an extent < 1, not 1..4 of them, an overflow.
absl::StatusOr<size_t> BytesOf(DType dtype, const Shape& shape);

}  // namespace lamina::client::internal
