// What the kernels take and how much scratch they ask for. No CUDA header: the sizes are computed
// on machines without a device too (cuda_sizes.h).
#pragma once

#include <cstddef>
#include <cstdint>

#include "lamina/kernels/dtype.h"

namespace lamina::cuda {

// What an algorithm of a product may use; more is of no use.
constexpr size_t kProductWorkspaceBytes = size_t{32} << 20;

// GradientStats: a double for each block's sum of squares.
constexpr int kMaxGradientStatsPartials = 1024;
constexpr size_t kGradientStatsWorkspaceBytes = kMaxGradientStatsPartials * sizeof(double);

// Lamb: two sums of squares for each chunk and a ratio for each segment. The chunks grow with the
// buffers' length so that this is enough; what bounds it is the number of segments.
constexpr size_t kLambWorkspaceBytes = size_t{4} << 20;

// What attention saves of each softmax row: a SoftmaxRow.
constexpr size_t kSoftmaxRowBytes = 8;

// Whether attention_wgmma.cuh and attention_mma.cuh have kernels for it; their pointers must be
// aligned to 16 bytes too, which the arena's are.
constexpr bool HasTensorCoreAttention(DType dtype, int64_t head_dim) {
  return (dtype == DType::kBF16 || dtype == DType::kF16) && head_dim > 0 && head_dim % 8 == 0 &&
         head_dim <= 128;
}

// Rows of a tile of gelu_product.cuh, each of which leaves a row of partial column sums.
constexpr int kGeluProductRows = 128;
constexpr int64_t GeluProductSlices(int64_t rows) {
  return (rows + kGeluProductRows - 1) / kGeluProductRows;
}
constexpr size_t GeluProductWorkspaceBytes(int64_t rows, int64_t cols) {
  return static_cast<size_t>(GeluProductSlices(rows) * cols) * sizeof(float);
}

// Tokens of a head whose backward is one block's with wgmma; and for longer sequences the queries,
// or the keys, of a block.
constexpr int64_t kWgmmaHeadRows = 128;
constexpr int64_t kWgmmaHeadDim = 64;  // wider ones have their own kernels, or shapes of them
constexpr int64_t WgmmaBlockRows(int64_t head_dim) { return head_dim <= kWgmmaHeadDim ? 192 : 128; }

// Keys of a block of the backward in one pass, for more tokens than kWgmmaHeadRows and head dims up
// to kWgmmaHeadDim; and its scratch, of which each block of a grid of at most one a multiprocessor
// has two sides: the sums of dq of up to kPassSlots tiles of 64 x 64 a side, and whose turn it is
// to add to one, for each of the four warps that do.
constexpr int64_t kPassKeys = 128;
constexpr int kPassSlots = 4;
constexpr size_t PassTurnBytes(int64_t multiprocessors) {
  return static_cast<size_t>(multiprocessors) * 2 * kPassSlots * 4 * sizeof(uint32_t);
}
constexpr size_t PassSumBytes(int64_t multiprocessors) {
  return static_cast<size_t>(multiprocessors) * 2 * kPassSlots * 64 * 64 * sizeof(float);
}
constexpr bool HasOnePassBackward(DType dtype, int64_t seq, int64_t head_dim,
                                  int64_t multiprocessors) {
  return HasTensorCoreAttention(dtype, head_dim) && seq > kWgmmaHeadRows &&
         head_dim <= kWgmmaHeadDim &&
         (seq + kPassKeys - 1) / kPassKeys <= (multiprocessors < 254 ? multiprocessors : 254);
}
// Where there is one and it is the faster one (H100, head dim 64): two kernels, which both need the
// dropout's bits, are it where there is none, up to 1024 tokens and wherever half of the scores are
// cut off, as neither of them waits for other blocks.
constexpr bool TakesOnePassBackward(DType dtype, int64_t seq, int64_t head_dim,
                                    int64_t multiprocessors, bool causal, bool dropout) {
  return HasOnePassBackward(dtype, seq, head_dim, multiprocessors) &&
         (dropout || (!causal && seq > 1024));
}

// How many sums of each column of dqkv the blocks of those backwards leave for dbias: one for
// `block_rows` tokens of a sequence of more than kWgmmaHeadRows. None where a block has fewer than
// kBiasSliceRows tokens on average: a pass over dqkv then takes less.
constexpr int64_t kBiasSliceRows = 32;
constexpr int64_t BiasSlices(int64_t tokens, int64_t batch, int64_t seq, int64_t block_rows) {
  const int64_t blocks = seq > kWgmmaHeadRows ? (seq + block_rows - 1) / block_rows : 1;
  return batch * blocks * kBiasSliceRows <= tokens ? batch * blocks : 0;
}
// As many as any so many tokens have, however they are cut into sequences.
constexpr int64_t MostBiasSlices(int64_t tokens) { return tokens / kBiasSliceRows; }
constexpr size_t BiasSliceBytes(int64_t slices, int64_t hidden) {
  return static_cast<size_t>(slices * 3 * hidden) * sizeof(float);
}

// Which of a head's attention probabilities dropout keeps: a bit each, in tiles of 64 x 64. The
// backward for more than kWgmmaHeadRows tokens draws them for two kernels, of as many heads at a
// time as fit into kMostKeptBitsBytes: much of that stays in the cache.
constexpr size_t kMostKeptBitsBytes = size_t{40} << 20;
constexpr size_t KeptBitsBytes(int64_t seq) {
  if (seq <= kWgmmaHeadRows) return 0;
  const int64_t tiles = (seq + 63) / 64;
  return static_cast<size_t>(tiles * tiles) * (64 * 64 / 8);
}
// Of a call with `heads` heads in all; 0 where not even one fits.
constexpr size_t KeptBitsBytes(int64_t seq, int64_t heads) {
  const size_t head = KeptBitsBytes(seq);
  if (head == 0 || head > kMostKeptBitsBytes) return 0;
  const size_t most = kMostKeptBitsBytes / head;
  return head * (static_cast<size_t>(heads) < most ? static_cast<size_t>(heads) : most);
}

// Blocks of a multiprocessor that column reductions are cut for (column_sum.cuh) at most, the
// columns that a block of them covers at most, and the blocks of a norm's backward, which has three
// such sums.
constexpr int kColumnSumBlocks = 8;
constexpr int kColumnSumWidth = 256;
constexpr int kRowNormBackwardBlocks = 2;
constexpr int kRowNormBackwardArrays = 3;

// What the norms of one layer's backward leave to FinishSums, at most, beside GELU and attention:
// three sums each of two norms, and in Pre-LN's last layer one of the sum that it ends with.
constexpr int kPendingNormArrays = 7;

// Captured steps of a stack (graph_cache.h): the device memory that they may take, and what a graph
// and each node of it are counted as. On an H100 the driver takes about 3,100 bytes a node, and for
// 48 graphs of 12 nodes 6 MiB, for 24 of twice as many 4 MiB; it asks for pages of 2 MiB.
constexpr size_t kGraphBytes = size_t{32} << 20;
constexpr size_t kGraphFixedBytes = size_t{128} << 10;
constexpr size_t kGraphNodeBytes = 4096;

}  // namespace lamina::cuda
