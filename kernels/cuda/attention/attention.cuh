// Scaled dot-product attention over a fused QKV matrix, in memory linear in S, forward and
// backward.
//
// Three implementations: attention_wgmma (tensor cores; bf16 and fp16, head dims that are multiples
// of 8 up to 128), whose forward is for 65 tokens and more; attention_mma, the forward for fewer;
// and attention_any (fp32 arithmetic; every dtype, S and head dim). The launchers here choose.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "common/dropout_params.h"
#include "kernel_limits.h"
#include "lamina/kernels/dtype.h"

namespace lamina::cuda {

// What the forward leaves of each softmax row for the backward, which computes the probabilities
// again: p = exp(score - max) * inverse_sum. The pair rather than its logarithm, because a
// log-sum-exp near a large finite mask value (-1e9, say) would lose the sum. A row whose keys are
// all masked out has {+inf, 0}, so that every p is 0.
struct SoftmaxRow {
  float max;
  float inverse_sum;
};
static_assert(sizeof(SoftmaxRow) == kSoftmaxRowBytes, "what the plan sets aside");

struct AttentionParams {
  const void* qkv = nullptr;         // act [T, 3H]
  const float* mask = nullptr;       // [B, S], added to scores; null: none
  const int32_t* lengths = nullptr;  // [B]; null: S
  // [B + 1]: sequence b is tokens [cu_seqlens[b], cu_seqlens[b + 1]), at most S; null: T is B*S.
  // With it neither mask nor lengths
  const int32_t* cu_seqlens = nullptr;
  bool causal = false;  // query s sees keys 0..s alone
  float scale = 1.0f;
  DropoutParams dropout;          // rows A*T as attention_head.cuh numbers them, cols S
  void* out = nullptr;            // act [T, H]; written by the forward, read by the backward
  SoftmaxRow* softmax = nullptr;  // [A*T]; the same; null in evaluation
  int64_t tokens = 0, batch = 0, seq = 0, heads = 0, head_dim = 0;
  int64_t width = 0;  // H = heads * head_dim
  DType dtype = DType::kF32;
  int multiprocessors = 1;  // the device's
  // Backward only.
  const void* dout = nullptr;  // act [T, H]
  void* dqkv = nullptr;        // act [T, 3H]
  float* dbias = nullptr;      // fp32 [3H], accumulated: column sums of dqkv; null: none
  float* delta = nullptr;      // workspace [A*T]: row sums of dout * out
  // Where tensor cores' backwards leave the columns' sums of dqkv: [sum_slices, 3*H], a slice for
  // BiasSlices' tokens each. Null: not wanted.
  float* sums = nullptr;
  int64_t sum_slices = 0;
  bool leave_sums = false;  // and they stay there; otherwise they are added to dbias
  // Workspace for KeptBitsBytes of at least a head; null: none.
  uint32_t* kept = nullptr;
  size_t kept_bytes = 0;
  // Workspace of the backward in one pass: PassTurnBytes and PassSumBytes; null: none.
  uint32_t* turns = nullptr;
  float* query_sums = nullptr;
  // Which heads, b * A + a, a launch does. Set by the launchers.
  int64_t first_head = 0;
  int64_t head_count = 0;  // 0: all
};

// cudaErrorInvalidValue where there are more than 2^31 - 1 blocks.
[[nodiscard]] cudaError_t LaunchAttention(const AttentionParams& params, cudaStream_t stream);
[[nodiscard]] cudaError_t LaunchAttentionBackward(const AttentionParams& params,
                                                  cudaStream_t stream);
// Whether LaunchAttentionBackward fills params.sums; otherwise the caller sums up dqkv.
bool BackwardSums(const AttentionParams& params);

}  // namespace lamina::cuda
