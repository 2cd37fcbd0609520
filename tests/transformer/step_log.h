// What a step enqueued, to the last argument, so that a test can tell whether two steps are the
// same. Of Dropout's and Workspace's pointers, and of every tensor's, the address counts; what lies
// there does not.
#pragma once

#include <bit>
#include <cstdint>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include "lamina/kernels/backend.h"

namespace lamina::testing {

class StepLog {
 public:
  void Clear() { words_.clear(); }
  bool empty() const { return words_.empty(); }
  friend bool operator==(const StepLog& a, const StepLog& b) = default;

  template <typename Args>
  void Op(const Workspace& ws, const Args& args) {
    Add(ws.data, ws.bytes, ws.unordered);
    AddArgs(args);
  }
  void Copy(const void* dst, const void* src, size_t bytes) { Add(dst, src, bytes); }

 private:
  void AddArgs(const LinearArgs& a) {
    Add(1, a.x, a.w, a.bias, a.y, a.apply_gelu, a.gelu, a.slope, a.pre);
  }
  void AddArgs(const LinearInputGradArgs& a) {
    Add(2, a.dy, a.w, a.dx, a.apply_gelu, a.gelu, a.slope, a.pre, a.y_again, a.dbias);
  }
  void AddArgs(const LinearWeightGradArgs& a) { Add(3, a.dy, a.x, a.dw); }
  void AddArgs(const GeluArgs& a) { Add(4, a.x, a.y, a.slope, a.gelu); }
  void AddArgs(const GeluBackwardArgs& a) {
    Add(5, a.slope, a.x, a.y_again, a.dy, a.dx, a.dbias, a.gelu);
  }
  void AddArgs(const LayerNormArgs& a) { Add(6, a.x, a.gamma, a.beta, a.eps, a.y, a.mean, a.rstd); }
  void AddArgs(const LayerNormBackwardArgs& a) {
    Add(7, a.dy, a.x, a.y, a.beta, a.gamma, a.mean, a.rstd, a.residual_grad, a.dx, a.dgamma,
        a.dbeta);
  }
  void AddArgs(const DropoutAddNormArgs& a) {
    Add(8, a.x, a.bias, a.residual, a.dropout, a.sum, a.gamma, a.beta, a.eps, a.y, a.mean, a.rstd);
  }
  void AddArgs(const DropoutAddNormBackwardArgs& a) {
    Add(9, a.dy, a.dsum, a.sum, a.y, a.beta, a.gamma, a.mean, a.rstd, a.dropout, a.dresidual, a.dx,
        a.dbias, a.dgamma, a.dbeta);
  }
  void AddArgs(const AttentionArgs& a) {
    Add(10, a.dims, a.qkv, a.mask, a.lengths, a.cu_seqlens, a.causal, a.scale, a.dropout, a.out,
        a.saved);
  }
  void AddArgs(const AttentionBackwardArgs& a) {
    Add(11, a.dims, a.qkv, a.mask, a.lengths, a.cu_seqlens, a.causal, a.scale, a.dropout, a.out,
        a.saved, a.dout, a.dqkv, a.dbias);
  }
  template <typename Args>
  void AddArgs(const Args&) {
    throw std::logic_error("a step has an op that StepLog doesn't know");
  }

  template <typename... Values>
  void Add(const Values&... values) {
    (AddOne(values), ...);
  }
  void AddOne(const TensorView& t) {
    Add(t.data, t.dtype, t.shape.rank());
    for (int i = 0; i < t.shape.rank(); ++i) AddOne(t.shape[i]);
  }
  void AddOne(const Dropout& d) { Add(d.ratio, d.rng, d.stream); }
  void AddOne(const LayerDims& d) {
    Add(d.batch, d.seq, d.hidden, d.heads, d.intermediate, d.dtype, d.packed_tokens);
  }
  void AddOne(const void* address) { words_.push_back(reinterpret_cast<uintptr_t>(address)); }
  void AddOne(float value) { words_.push_back(std::bit_cast<uint32_t>(value)); }
  template <typename Int>
  requires(std::is_integral_v<Int> || std::is_enum_v<Int>) void AddOne(Int value) {
    words_.push_back(static_cast<uint64_t>(value));
  }

  std::vector<uint64_t> words_;
};

}  // namespace lamina::testing
