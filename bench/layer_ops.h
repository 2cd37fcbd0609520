// Every op of a layer, with the arguments that kernels/transformer/layer.cc calls it with.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "device.h"
#include "lamina/kernels/backend.h"

namespace lamina::bench {

using OpCall = std::function<absl::Status(const Workspace&)>;

// The tensors of one call, counted as an op moves them.
class Operands {
 public:
  explicit Operands(Device& device) : tensors_(device) {}

  TensorView Read(DType dtype, const Shape& shape) { return Moved(dtype, shape, 1); }
  TensorView Write(DType dtype, const Shape& shape) { return Moved(dtype, shape, 1); }
  TensorView Update(DType dtype, const Shape& shape) { return Moved(dtype, shape, 2); }
  TensorView UpdateZeros(DType dtype, const Shape& shape);

  size_t moved_bytes() const { return moved_bytes_; }
  Tensors& tensors() { return tensors_; }  // for what is too small to count
  Backend& backend() { return tensors_.device().backend(); }

 private:
  TensorView Moved(DType dtype, const Shape& shape, size_t times);

  Tensors tensors_;
  size_t moved_bytes_ = 0;
};

struct OpCase {
  std::string name;
  double flops = 0;          // of its products; what else it computes hides behind the bytes
  int calls_pre_norm = 0;    // in forward and backward of a layer between others, Pre-LN
  int calls_post_norm = 0;   // the same, Post-LN
  bool sums_tokens = false;  // Workspace::unordered may change it
  // A call on operands of its own, which live as long as the Operands.
  std::function<OpCall(Operands&)> make;
};

// `layers`: of the stack whose parameters an optimizer's step goes over. `workspace` is for the
// calls that come before the one that is timed.
std::vector<OpCase> LayerOps(const LayerDims& dims, float dropout, int64_t layers,
                             const Workspace& workspace);

// y [M, N] = x [M, K] w [N, K]^T with M = N = K = `size`, and a device copy of `bytes`: what the
// device can do at most.
OpCase ProductCeiling(DType dtype, int64_t size);
OpCase CopyCeiling(int64_t bytes);

}  // namespace lamina::bench
