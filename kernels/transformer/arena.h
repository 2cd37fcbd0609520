// Memory of a stack: one backend allocation an arena, and the bookkeeping of the activation
// contexts inside theirs.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "lamina/kernels/backend.h"

namespace lamina {

// One allocation, freed by the destructor. Must not outlive the backend.
class DeviceArena {
 public:
  DeviceArena() = default;  // holds nothing
  ~DeviceArena() { Reset(); }
  DeviceArena(DeviceArena&& other) noexcept { *this = std::move(other); }
  DeviceArena& operator=(DeviceArena&& other) noexcept;

  static absl::StatusOr<DeviceArena> Allocate(Backend& backend, size_t bytes);
  void Reset();

  void* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  Backend* backend_ = nullptr;
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

// First-fit over [0, bytes): the lowest free range that is large enough. Offsets and sizes are
// multiples of what callers ask for in; callers ask in multiples of 256.
class RangeAllocator {
 public:
  explicit RangeAllocator(size_t bytes = 0);

  // An offset; RESOURCE_EXHAUSTED with the numbers.
  absl::StatusOr<size_t> Take(size_t bytes);
  void Give(size_t offset, size_t bytes);

  size_t in_use() const { return in_use_; }
  size_t high_water() const { return high_water_; }
  int64_t taken() const { return taken_; }  // ranges out

 private:
  size_t bytes_;
  std::map<size_t, size_t> free_;  // offset -> bytes, never touching each other
  size_t in_use_ = 0, high_water_ = 0;
  int64_t taken_ = 0;
};

}  // namespace lamina
