// Non-owning views of dense row-major tensors. C++17 and free of dependencies: CUDA sources include
// it too. A view says nothing of which memory it points into; an op takes only its own backend's.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>

#include "lamina/kernels/dtype.h"

namespace lamina {

// Up to four extents, outermost first.
class Shape {
 public:
  static constexpr int kMaxRank = 4;

  constexpr Shape() = default;
  constexpr Shape(std::initializer_list<int64_t> dims) {
    for (int64_t d : dims) dims_[static_cast<size_t>(rank_++)] = d;
  }
  constexpr int rank() const { return rank_; }
  constexpr int64_t operator[](int i) const { return dims_[static_cast<size_t>(i)]; }
  constexpr int64_t elements() const {
    int64_t n = 1;
    for (int i = 0; i < rank_; ++i) n *= dims_[static_cast<size_t>(i)];
    return n;
  }
  friend constexpr bool operator==(const Shape& a, const Shape& b) {
    if (a.rank_ != b.rank_) return false;
    for (int i = 0; i < a.rank_; ++i)
      if (a[i] != b[i]) return false;
    return true;
  }
  friend constexpr bool operator!=(const Shape& a, const Shape& b) { return !(a == b); }
  // "[8, 128, 256]"
  std::string ToString() const {
    std::string s = "[";
    for (int i = 0; i < rank_; ++i) {
      if (i > 0) s += ", ";
      s += std::to_string((*this)[i]);
    }
    return s + "]";
  }

 private:
  std::array<int64_t, kMaxRank> dims_{};
  int rank_ = 0;
};

// A default-constructed view is absent: how optional tensors are passed. `data` is aligned to the
// element size at least; what the arena hands out is aligned to 256 bytes.
struct TensorView {
  void* data = nullptr;
  DType dtype = DType::kF32;
  Shape shape;

  constexpr explicit operator bool() const { return data != nullptr; }
  constexpr int64_t elements() const { return shape.elements(); }
  constexpr size_t bytes() const { return static_cast<size_t>(elements()) * SizeOf(dtype); }
  template <typename T>
  T* as() const {
    return static_cast<T*>(data);
  }
  // The same elements under another shape of the same count.
  constexpr TensorView Reshaped(Shape s) const { return TensorView{data, dtype, s}; }
  // Rows [begin, end) of the outermost dimension.
  TensorView Rows(int64_t begin, int64_t end) const;
};

inline TensorView TensorView::Rows(int64_t begin, int64_t end) const {
  const int64_t row = elements() / shape[0];
  Shape s;
  switch (shape.rank()) {
    case 1:
      s = Shape{end - begin};
      break;
    case 2:
      s = Shape{end - begin, shape[1]};
      break;
    case 3:
      s = Shape{end - begin, shape[1], shape[2]};
      break;
    default:
      s = Shape{end - begin, shape[1], shape[2], shape[3]};
  }
  return TensorView{static_cast<char*>(data) + static_cast<size_t>(begin * row) * SizeOf(dtype),
                    dtype, s};
}

}  // namespace lamina
