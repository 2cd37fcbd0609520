// Where each parameter lies in the flat buffers.
//
// A flat buffer (weights, master weights, gradients, m, v) holds every parameter of every layer at
// the same element offset: all matrices first, then all biases and norm vectors, so that AdamW with
// decay on the matrices alone is two launches. Each parameter starts at a multiple of
// kAlignElements, 256 bytes even in two-byte types; the elements between are padding and stay zero.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "lamina/kernels/tensor.h"
#include "lamina/transformer/config.h"
#include "lamina/transformer/stack.h"

namespace lamina {

// One layer's parameters, or their gradients. Shapes in stack.h.
struct LayerTensors {
  TensorView attn_qkvw, attn_qkvb, attn_ow, attn_ob, attn_nw, attn_nb;
  TensorView inter_w, inter_b, output_w, output_b, norm_w, norm_b;
};

enum class ParameterRole : uint8_t {
  kInnerMatrix,   // attn_qkvw, inter_w
  kOutputMatrix,  // attn_ow, output_w: their deviation shrinks with adjust_init_range
  kBias,          // starts at zero, like the norms' shifts
  kGamma,         // starts at one
};

struct ParameterKind {
  const char* name;
  ParameterRole role;
  TensorView LayerTensors::*member;
};
inline constexpr int kParametersPerLayer = 12;
// In the order in which parameters are listed and numbered.
extern const ParameterKind kParameterKinds[kParametersPerLayer];

inline bool IsMatrix(ParameterRole role) {
  return role == ParameterRole::kInnerMatrix || role == ParameterRole::kOutputMatrix;
}

class ParameterLayout {
 public:
  static constexpr int64_t kAlignElements = 128;

  explicit ParameterLayout(const StackConfig& config);

  // Of one flat buffer, padding included; the first decayed_elements() are the matrices.
  int64_t elements() const { return elements_; }
  int64_t decayed_elements() const { return decayed_elements_; }

  // Stored parameters: parameters()[layer * kParametersPerLayer + kind].
  const std::vector<ParameterInfo>& parameters() const { return parameters_; }

  struct Slot {
    ParameterInfo info;
    int64_t offset = 0;  // in elements
    int64_t layer = 0;
  };
  // Takes attn_qw and the like too, which are rows of the fused ones. NOT_FOUND.
  absl::StatusOr<Slot> Find(const std::string& name) const;

  // Elements that a parameter of this kind takes, padding included.
  int64_t PaddedElements(int kind) const;
  int64_t Offset(int64_t layer, int kind) const;
  Shape ShapeOf(int kind) const;

  // Views of one layer's parameters in the flat buffer at `base`.
  LayerTensors LayerViews(int64_t layer, void* base, DType dtype) const;

 private:
  int64_t hidden_, intermediate_, layers_;
  int64_t matrices_per_layer_ = 0, vectors_per_layer_ = 0;
  int64_t offset_in_layer_[kParametersPerLayer];  // within the layer's matrices or vectors
  int64_t elements_ = 0, decayed_elements_ = 0;
  std::vector<ParameterInfo> parameters_;
};

}  // namespace lamina
