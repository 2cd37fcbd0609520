// Purpose: which sequence, head and rows a block of an attention kernel has; device code that the
// implementations share.
//
// Every token of every head has one softmax row. Those of a (sequence, head) lie together:
//   row = token * A + a * length + s,  token the sequence's first token, length its length.
// Without packing token = b * S and length = S, so this is (b * A + a) * S + s; in a packed batch
// of equal lengths it is the same number. A row is what SoftmaxRow and delta are indexed by, and
// the row of the dropout mask.
#pragma once

#include <cstdint>

#include "attention/attention.cuh"

namespace lamina::cuda {

struct Sequence {
  int64_t token;  // the first
  int length;
  int keys;  // that are not cut off by a length
};

__device__ __forceinline__ Sequence SequenceOf(const AttentionParams& p, int64_t batch) {
  Sequence sequence{batch * p.seq, static_cast<int>(p.seq), 0};
  if (p.cu_seqlens != nullptr) {
    // The caller has checked the boundaries. They lie in device memory all the same: whatever they
    // are, the sequence stays within the T tokens, and within the rows that the grid covers.
    sequence.token = min(max(int64_t{p.cu_seqlens[batch]}, int64_t{0}), p.tokens);
    const int64_t length = int64_t{p.cu_seqlens[batch + 1]} - sequence.token;
    sequence.length =
        static_cast<int>(min(max(length, int64_t{0}), min(p.seq, p.tokens - sequence.token)));
  }
  sequence.keys = sequence.length;
  if (p.lengths != nullptr) sequence.keys = max(0, min(sequence.keys, p.lengths[batch]));
  return sequence;
}

// A block's rows are queries in the forward and in the dQ kernel, keys in the dK/dV kernel.
enum class BlockRows { kQueries, kKeys };

// One (b, a) with a block of rows.
struct Head {
  int64_t index;   // of the call's heads, b * A + a, counted from first_head
  int64_t batch;   // b
  int64_t token;   // the sequence's first
  int64_t row;     // softmax row of that token
  int64_t column;  // of the head in an [.., H] row
  int length;      // of the sequence
  int first;       // row of the block
  int keys;        // keys that are not cut off: by a length, or for all of a block's queries by
                   // causality
};

// Block `block` of kRows rows of the launch's head `index`, which is head `head` of sequence
// `batch`. `first` may be at or beyond the sequence's end: there are as many blocks as the longest
// one has, and such a block has nothing to do.
template <int kRows, BlockRows kBlockRows>
__device__ __forceinline__ Head HeadAt(const AttentionParams& p, const Sequence& sequence,
                                       int64_t index, int64_t batch, int64_t head, int64_t block) {
  Head h;
  h.index = index;
  h.batch = batch;
  h.token = sequence.token;
  h.length = sequence.length;
  h.row = h.token * p.heads + head * h.length;
  h.column = head * p.head_dim;
  h.first = static_cast<int>(block) * kRows;
  h.keys = sequence.keys;
  if (kBlockRows == BlockRows::kQueries && p.causal) h.keys = min(h.keys, h.first + kRows);
  return h;
}
template <int kRows, BlockRows kBlockRows>
__device__ __forceinline__ Head HeadAt(const AttentionParams& p, int64_t index, int64_t batch,
                                       int64_t head, int64_t block) {
  return HeadAt<kRows, kBlockRows>(p, SequenceOf(p, batch), index, batch, head, block);
}

// Of block `grid_block` of a grid with one for every kRows rows of a head.
template <int kRows, BlockRows kBlockRows>
__device__ __forceinline__ Head HeadOfBlock(const AttentionParams& p, unsigned grid_block) {
  const int64_t blocks = (p.seq + kRows - 1) / kRows;
  const int64_t index = grid_block / blocks;
  int64_t block = grid_block - index * blocks;
  // The last queries see the most keys: the longest blocks start first. Of keys, the first ones are
  // seen by the most queries, and start first anyway.
  if (kBlockRows == BlockRows::kQueries && p.causal) block = blocks - 1 - block;
  const int64_t batch = (p.first_head + index) / p.heads;
  const int64_t head = p.first_head + index - batch * p.heads;
  return HeadAt<kRows, kBlockRows>(p, index, batch, head, block);
}

template <int kRows, BlockRows kBlockRows>
__device__ __forceinline__ Head HeadOfBlock(const AttentionParams& p) {
  return HeadOfBlock<kRows, kBlockRows>(p, blockIdx.x);
}

// What is added to the scores of `key`; -inf where it is cut off.
__device__ __forceinline__ float KeyBias(const AttentionParams& p, const Head& h, int key) {
  if (key >= h.keys) return -INFINITY;
  return p.mask != nullptr ? p.mask[h.batch * p.seq + key] : 0.0f;
}

}  // namespace lamina::cuda
