// Which norms can be inverted: what normalize_invertible asks of their weights.
//
// Backward reads the normalised values back from the norm's output, x^ = (y - beta) / gamma. What
// that loses is the rounding of y = gamma x^ + beta to the stack's dtype. With u the dtype's unit
// roundoff, y is off by at most u |y| <= u (|gamma x^| + |beta|), so x^ by
//   u |x^|  +  u |beta| / |gamma|.
// The first term any stored tensor has. The second is the price, and x^ has deviation 1: it may
// cost half of the dtype's digits, sqrt(u). Hence |gamma| >= |beta| sqrt(u): |beta| may be 4096
// times |gamma| in fp32, 45 times in fp16, 16 times in bf16.
//
// Where |y| is below the dtype's least normal number N its rounding is coarser than u |y|. Flushed
// to zero, it is off by N, and x^ by N / |gamma|: with the same allowance |gamma| >= N / sqrt(u).
// That is 2^-8.5 in fp16 and next to nothing in the others.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "lamina/kernels/dtype.h"
#include "lamina/transformer/stack.h"
#include "parameters.h"

namespace lamina {

// The least |gamma| that can be divided by where the norm's shift is `beta`.
double LeastInvertibleGamma(DType dtype, double beta);

// The last verdict on each layer's norms. It goes stale when weights change; whoever changes them
// says so.
class InvertibleNorms {
 public:
  InvertibleNorms(const StackConfig& config, const ParameterLayout& parameters)
      : dtype_(config.dtype), parameters_(parameters) {}

  bool stale() const { return stale_; }
  void MarkStale() { stale_ = true; }

  // Where the host copy of the flat buffer's biases and norm vectors, from element
  // decayed_elements() on, is to be put for Judge. fp32.
  std::vector<float>& vectors();
  // Judges what vectors() holds.
  void Judge();

  // Of the layers of a call. FAILED_PRECONDITION naming the first channel that fails. Not stale.
  absl::Status Check(LayerRange layers) const;

 private:
  absl::Status JudgeNorm(int64_t layer, int gamma_kind, int beta_kind) const;

  DType dtype_;
  const ParameterLayout& parameters_;
  bool stale_ = true;
  std::vector<float> vectors_;
  std::vector<absl::Status> verdicts_;  // one a layer
};

}  // namespace lamina
