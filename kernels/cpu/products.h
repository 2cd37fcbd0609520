// The large matrix products, by oneDNN. A primitive is made once for each kind and shape and kept.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "absl/status/status.h"
#include "lamina/kernels/dtype.h"

namespace lamina::cpu {

// c [m, n] = op(a) [m, k] op(b) [k, n] (+ bias) (+ c), everything dense and row-major, accumulated
// in fp32 and rounded once.
struct Product {
  int64_t m = 0, n = 0, k = 0;
  DType in = DType::kF32;   // a, b and bias: fp32, or bf16 where Products::bf16()
  DType out = DType::kF32;  // c: fp32, or `in`
  const void* a = nullptr;  // [m, k], or [k, m] with transpose_a
  bool transpose_a = false;
  const void* b = nullptr;  // [k, n], or [n, k] with transpose_b
  bool transpose_b = false;
  const void* bias = nullptr;  // [n]; null: none
  void* c = nullptr;
  bool accumulate = false;  // add to what c holds
};

// Threads: one at a time. Bits depend on the shape and on the thread count (oneDNN may split k
// among threads), not on the run.
class Products {
 public:
  explicit Products(int threads);
  ~Products();
  Products(const Products&) = delete;
  Products& operator=(const Products&) = delete;

  // Whether this processor multiplies bf16 as fast as it should; else convert to fp32 first.
  bool bf16() const;

  // INTERNAL with oneDNN's own status where it fails. The first call of a shape allocates, the
  // later ones do not, but for a few words inside oneDNN.
  absl::Status Multiply(const Product& product);

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace lamina::cpu
