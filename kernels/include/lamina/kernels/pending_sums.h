// Column sums that ops have left in parts, for one call to finish together: Backend::FinishSums.
// C++17 and free of dependencies: CUDA sources include it too.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lamina {

// A list of such sums, and the memory that their parts lie in. Who calls ops makes it, over memory
// of the backend's, and hands it to them by Workspace::pending; the memory must outlive it.
// Threads: one at a time.
class PendingSums {
 public:
  // dst[c] += the sum over s of partials[s * cols + c]. Both in the backend's memory.
  struct Vector {
    const float* partials = nullptr;
    float* dst = nullptr;
    int64_t slices = 0, cols = 0;
  };
  static constexpr int kMostVectors = 12;

  PendingSums() = default;
  // `data` is aligned to 256 bytes; null with no bytes: there is no room for anything.
  PendingSums(void* data, size_t bytes) : data_(static_cast<char*>(data)), bytes_(bytes) {}

  // For an op: takes room for `count` matrices [slices, cols], one after the other, of which matrix
  // i holds the partial sums of dst[i]; a null dst has its matrix, but nothing is to be finished.
  // Null, with nothing taken, where there is no room, or one of these vectors is in the list: the
  // op then finishes its sums by itself.
  float* Leave(float* const* dst, int count, int64_t slices, int64_t cols) {
    const size_t bytes = RoomFor(count, slices, cols);
    if (bytes > bytes_ - used_ || count > kMostVectors - count_) return nullptr;
    for (int i = 0; i < count; ++i) {
      for (int j = 0; j < count_; ++j)
        if (dst[i] != nullptr && vectors_[j].dst == dst[i]) return nullptr;
    }
    auto* const partials = reinterpret_cast<float*>(data_ + used_);
    for (int i = 0; i < count; ++i) {
      if (dst[i] != nullptr)
        vectors_[count_++] = {partials + i * slices * cols, dst[i], slices, cols};
    }
    used_ += bytes;
    return partials;
  }
  // What Leave takes for them.
  static constexpr size_t RoomFor(int count, int64_t slices, int64_t cols) {
    const size_t bytes =
        static_cast<size_t>(count) * static_cast<size_t>(slices * cols) * sizeof(float);
    return (bytes + 255) / 256 * 256;
  }

  int count() const { return count_; }
  const Vector& operator[](int i) const { return vectors_[i]; }
  // Nothing is pending, and all of the memory is free.
  void Clear() { count_ = 0, used_ = 0; }

 private:
  char* data_ = nullptr;
  size_t bytes_ = 0, used_ = 0;
  int count_ = 0;
  Vector vectors_[kMostVectors];
};

}  // namespace lamina
