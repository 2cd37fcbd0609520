#include "arena.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "status_macros.h"

namespace lamina {

DeviceArena& DeviceArena::operator=(DeviceArena&& other) noexcept {
  if (this == &other) return *this;
  Reset();
  backend_ = std::exchange(other.backend_, nullptr);
  data_ = std::exchange(other.data_, nullptr);
  bytes_ = std::exchange(other.bytes_, 0);
  return *this;
}

absl::StatusOr<DeviceArena> DeviceArena::Allocate(Backend& backend, size_t bytes) {
  DeviceArena arena;
  LAMINA_ASSIGN_OR_RETURN(arena.data_, backend.Allocate(bytes));
  arena.backend_ = &backend;
  arena.bytes_ = bytes;
  return arena;
}

void DeviceArena::Reset() {
  if (data_ != nullptr) backend_->Free(data_);
  backend_ = nullptr;
  data_ = nullptr;
  bytes_ = 0;
}

RangeAllocator::RangeAllocator(size_t bytes) : bytes_(bytes) {
  if (bytes > 0) free_[0] = bytes;
}

absl::StatusOr<size_t> RangeAllocator::Take(size_t bytes) {
  size_t largest = 0;
  for (auto it = free_.begin(); it != free_.end(); ++it) {
    const auto [offset, free_bytes] = *it;
    largest = std::max(largest, free_bytes);
    if (free_bytes < bytes) continue;
    free_.erase(it);
    if (free_bytes > bytes) free_[offset + bytes] = free_bytes - bytes;
    in_use_ += bytes;
    high_water_ = std::max(high_water_, in_use_);
    ++taken_;
    return offset;
  }
  return absl::ResourceExhaustedError(
      absl::StrCat(bytes, " bytes are wanted; ", in_use_, " of ", bytes_, " bytes are in use by ",
                   taken_, " contexts and the largest free range has ", largest, " bytes"));
}

void RangeAllocator::Give(size_t offset, size_t bytes) {
  in_use_ -= bytes;
  --taken_;
  const auto next = free_.lower_bound(offset);
  if (next != free_.begin()) {
    const auto before = std::prev(next);
    if (before->first + before->second == offset) {
      offset = before->first;
      bytes += before->second;
      free_.erase(before);
    }
  }
  if (next != free_.end() && offset + bytes == next->first) {
    bytes += next->second;
    free_.erase(next);
  }
  free_[offset] = bytes;
}

}  // namespace lamina
