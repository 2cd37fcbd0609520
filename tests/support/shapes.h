// The table of shapes that tests and benchmarks share.
#pragma once

#include <cstdint>
#include <string>

#include "absl/strings/str_cat.h"
#include "lamina/kernels/backend.h"

namespace lamina::testing {

// Letters as in backend.h.
struct LayerShape {
  int64_t batch, seq, hidden, heads, intermediate;

  LayerDims Dims(DType dtype) const {
    return LayerDims{.batch = batch,
                     .seq = seq,
                     .hidden = hidden,
                     .heads = heads,
                     .intermediate = intermediate,
                     .dtype = dtype};
  }
  int64_t tokens() const { return batch * seq; }
  int64_t head_dim() const { return hidden / heads; }
  // "B2_S51_H64_A4_I96": fit for a test's name.
  std::string Name() const {
    return absl::StrCat("B", batch, "_S", seq, "_H", hidden, "_A", heads, "_I", intermediate);
  }
};

// Small enough for an oracle of plain loops on one core; each is here for a reason.
inline constexpr LayerShape kOpShapes[] = {
    {1, 1, 1, 1, 1},        // everything one
    {1, 1, 8, 2, 5},        // one token
    {2, 3, 5, 1, 7},        // all prime
    {3, 7, 24, 3, 40},      // small and plain: D 8
    {1, 5, 33, 3, 17},      // D 11: rows of no vector's width
    {1, 17, 100, 25, 36},   // D 4, as many heads as H 1600 has
    {5, 21, 96, 6, 384},    // D 16; DeepSpeed's short sequences
    {2, 51, 64, 4, 96},     // DeepSpeed's odd sequence lengths, from here
    {1, 119, 48, 4, 64},    // D 12
    {1, 509, 20, 2, 24},    // D 10
    {1, 130, 128, 2, 512},  // D 64 and S just over a tile of 128
    {2, 128, 160, 2, 128},  // DeepSpeed's H 160: D 80
    {3, 52, 256, 4, 64},    // DeepSpeed's S 52
    {1, 33, 192, 1, 64},    // D 192
    {1, 51, 1024, 16, 32},  // BERT-Large's width
    {1, 13, 1600, 25, 40},  // GPT-2 XL's width
    {1, 6, 1600, 1, 24},    // D 1600: one head of that width
    {1, 8, 2560, 40, 24},   // DeepSpeed's widest that fits here
    {1, 2048, 8, 1, 16},    // DeepSpeed's longest
};

// Whole layers, as DeepSpeed's own tests run them: for benchmarks and for GPU machines.
inline constexpr LayerShape kDeepSpeedShapes[] = {
    {64, 128, 160, 2, 640},    {8, 128, 1600, 25, 6400},  {8, 52, 256, 4, 1024},
    {3, 51, 1024, 16, 4096},   {3, 54, 1024, 16, 4096},   {8, 119, 1024, 16, 4096},
    {8, 120, 1024, 16, 4096},  {8, 381, 1024, 16, 4096},  {8, 384, 1024, 16, 4096},
    {8, 509, 1024, 16, 4096},  {8, 511, 1024, 16, 4096},  {8, 512, 1024, 16, 4096},
    {64, 21, 1024, 16, 4096},  {64, 24, 1024, 16, 4096},  {64, 53, 1024, 16, 4096},
    {64, 56, 1024, 16, 4096},  {8, 128, 128, 2, 512},     {8, 128, 1536, 24, 6144},
    {8, 128, 2048, 32, 8192},  {8, 128, 2560, 40, 10240}, {8, 128, 4096, 64, 16384},
    {8, 128, 8192, 64, 32768}, {1, 2048, 256, 32, 1024},
};

// BERT-Large at one number of tokens: what is compared with others' figures.
inline constexpr LayerShape kBertLargeShapes[] = {
    {64, 128, 1024, 16, 4096},
    {16, 512, 1024, 16, 4096},
    {4, 2048, 1024, 16, 4096},
};

}  // namespace lamina::testing
