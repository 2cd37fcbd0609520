// Reads and writes .npy files (NumPy format 1.0, 2.0, 3.0): dense little-endian arrays in C order.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace lamina::cli {

struct NpyArray {
  enum class Type { kFloat16, kFloat32, kFloat64, kInt32, kInt64 };
  Type type = Type::kFloat32;
  std::vector<int64_t> shape;  // empty: a scalar
  std::string data;            // the elements

  int64_t elements() const;
  std::string descr() const;  // "<f4"
  // Floating arrays alone; fp64 is rounded. INVALID_ARGUMENT for the others.
  absl::StatusOr<std::vector<float>> ToFloats() const;
  // Integer arrays alone. INVALID_ARGUMENT for the others, and for a value that int32 cannot hold.
  absl::StatusOr<std::vector<int32_t>> ToInts() const;
};

// INVALID_ARGUMENT, naming the file: it cannot be read, is not .npy, is damaged or cut short, is
// big endian, in Fortran order or of a type that NpyArray lacks.
absl::StatusOr<NpyArray> ReadNpy(const std::string& path);

// Writes version 1.0. INTERNAL: the file cannot be written.
absl::Status WriteNpy(const std::string& path, const NpyArray& array);

}  // namespace lamina::cli
