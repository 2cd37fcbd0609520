// Element types of tensors. C++17 and free of dependencies: CUDA sources include it too.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lamina {

enum class DType : uint8_t {
  kF32 = 1,
  kBF16 = 2,
  kF16 = 3,
  kI32 = 4,  // valid lengths only
  kU8 = 5,   // opaque bytes: what an attention Forward saves, workspace
};

constexpr size_t SizeOf(DType t) {
  switch (t) {
    case DType::kF32:
    case DType::kI32:
      return 4;
    case DType::kBF16:
    case DType::kF16:
      return 2;
    case DType::kU8:
      return 1;
  }
  return 0;
}

constexpr const char* Name(DType t) {
  switch (t) {
    case DType::kF32:
      return "fp32";
    case DType::kBF16:
      return "bf16";
    case DType::kF16:
      return "fp16";
    case DType::kI32:
      return "int32";
    case DType::kU8:
      return "uint8";
  }
  return "invalid";
}

// What weights and activations may be.
constexpr bool IsFloat(DType t) {
  return t == DType::kF32 || t == DType::kBF16 || t == DType::kF16;
}

}  // namespace lamina
