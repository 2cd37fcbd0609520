// Reads the .safetensors files of tests/golden (made there by generate.py): fp32 and int32 only.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "lamina/kernels/tensor.h"

namespace lamina::testing {

struct GoldenTensor {
  Shape shape;
  std::vector<float> floats;  // of an F32 tensor
  std::vector<int32_t> ints;  // of an I32 tensor
};

struct GoldenFile {
  std::map<std::string, std::string> metadata;
  std::map<std::string, GoldenTensor> tensors;
};

// The folder: LAMINA_GOLDEN_DIR; else golden/ beside the test binary or its parent, else the source
// tree around the build folder. Throws std::runtime_error with what it tried.
std::string GoldenFolder();
// `name` without its ending. Throws std::runtime_error for anything unexpected.
GoldenFile ReadGolden(const std::string& name);

}  // namespace lamina::testing
