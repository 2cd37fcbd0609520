#include "attention.h"

#include <algorithm>

#include "column_sum.h"

namespace lamina::cpu {
namespace {

// Blocks of queries beside which packing the head's keys and values once more costs little.
constexpr int64_t kLeastUnequalBlocks = 8;

template <typename T>
T* At(const TensorView& t, int64_t element) {
  return reinterpret_cast<T*>(t.as<char>() + static_cast<size_t>(element) * SizeOf(t.dtype));
}

// The tokens of one sequence.
struct Sequence {
  int64_t first, length;
};

template <typename Args>
Sequence SequenceOf(const Args& args, int64_t b) {
  const LayerDims& dims = args.dims;
  if (!args.cu_seqlens) return {b * dims.seq, dims.seq};
  // Clamped: numbers out of range must not become addresses.
  const int32_t* ends = args.cu_seqlens.template as<int32_t>();
  const int64_t first = std::clamp<int64_t>(ends[b], 0, dims.tokens());
  const int64_t most = std::min(dims.seq, dims.tokens() - first);
  return {first, std::clamp<int64_t>(ends[b + 1] - first, 0, most)};
}

// Where head `a` begins in a matrix [T, n * H], in elements.
int64_t HeadBegin(const LayerDims& dims, const Sequence& sequence, int64_t a, int64_t n) {
  return sequence.first * n * dims.hidden + a * dims.head_dim();
}

// What Forward and Backward read, of head `index` = b*A + a.
template <typename Args>
AttentionHead HeadOf(const Args& args, const DropoutKey& dropout, int64_t index) {
  const LayerDims& dims = args.dims;
  const int64_t b = index / dims.heads, a = index % dims.heads;
  const Sequence sequence = SequenceOf(args, b);
  const int64_t q = HeadBegin(dims, sequence, a, 3), o = HeadBegin(dims, sequence, a, 1);
  const int64_t first_row = sequence.first * dims.heads + a * sequence.length;
  AttentionHead head{};
  head.q = At<void>(args.qkv, q);
  head.k = At<void>(args.qkv, q + dims.hidden);
  head.v = At<void>(args.qkv, q + 2 * dims.hidden);
  head.qkv_stride = 3 * dims.hidden;
  head.s = sequence.length;
  head.d = dims.head_dim();
  head.keys = sequence.length;
  if (args.lengths)  // clamped, as above
    head.keys = std::clamp<int64_t>(args.lengths.template as<int32_t>()[b], 0, dims.seq);
  head.causal = args.causal;
  if (args.mask) head.mask = args.mask.template as<float>() + sequence.first;
  head.scale = args.scale;
  head.dropout = dropout;
  head.first_row = static_cast<uint64_t>(first_row);
  if (args.saved) head.saved = reinterpret_cast<float*>(args.saved.data) + first_row * 2;
  head.out_stride = dims.hidden;
  if constexpr (requires { args.dqkv; }) {
    head.dout = At<void>(args.dout, o);
    head.dq = At<void>(args.dqkv, q);
    head.dk = At<void>(args.dqkv, q + dims.hidden);
    head.dv = At<void>(args.dqkv, q + 2 * dims.hidden);
  } else {
    head.out = At<void>(args.out, o);
  }
  return head;
}

size_t ScratchBytes(const LayerDims& dims, int threads, bool backward) {
  return static_cast<size_t>(threads *
                             AttentionScratchFloats(dims.seq, dims.head_dim(), backward)) *
         sizeof(float);
}

}  // namespace

size_t AttentionSaved(const LayerDims& dims) {
  return static_cast<size_t>(dims.tokens() * dims.heads) * 2 * sizeof(float);
}

size_t AttentionWorkspaceBytes(const LayerDims& dims, int threads) {
  return std::max(ScratchBytes(dims, threads, true),
                  ColumnSumWorkspaceBytes(dims.tokens(), 3 * dims.hidden));
}

absl::Status Attention(const Context& context, const Workspace& ws, const AttentionArgs& args) {
  const LayerDims& dims = args.dims;
  const absl::Status enough =
      NeedWorkspace("Attention", ws, ScratchBytes(dims, context.threads, false));
  if (!enough.ok()) return enough;
  const auto kernel = context.kernels.of(args.qkv.dtype).attention;
  const DropoutKey dropout = KeyOf(args.dropout);
  const int64_t scratch = AttentionScratchFloats(dims.seq, dims.head_dim(), false);
  // Whole heads; where there are fewer than threads, parts of their queries, and finer ones where
  // parts cost unequally.
  const int64_t heads = dims.batch * dims.heads, threads = context.threads;
  const int64_t all_blocks = (dims.seq + kQueryBlock - 1) / kQueryBlock;
  int64_t parts = std::min(all_blocks, (threads + heads - 1) / heads);
  if (args.causal || args.cu_seqlens)
    parts = std::max(parts, std::min(4 * threads / heads, all_blocks / kLeastUnequalBlocks));
  ParallelItems(context.threads, heads * parts, [&](int thread) {
    return [&, thread, packed = int64_t{-1}](int64_t item) mutable {
      const int64_t index = item / parts, part = item % parts;
      AttentionHead head = HeadOf(args, dropout, index);
      const int64_t blocks = (head.s + kQueryBlock - 1) / kQueryBlock;
      const int64_t first = blocks * part / parts * kQueryBlock;
      const int64_t last = std::min(head.s, blocks * (part + 1) / parts * kQueryBlock);
      if (first >= last) return;
      head.scratch = Floats(ws, thread * scratch);
      kernel(head, first, last, /*pack=*/index != packed);
      packed = index;
    };
  });
  return absl::OkStatus();
}

absl::Status AttentionBackward(const Context& context, const Workspace& ws,
                               const AttentionBackwardArgs& args) {
  const LayerDims& dims = args.dims;
  const absl::Status enough =
      NeedWorkspace("AttentionBackward", ws, ScratchBytes(dims, context.threads, true));
  if (!enough.ok()) return enough;
  const auto kernel = context.kernels.of(args.qkv.dtype).attention_backward;
  const DropoutKey dropout = KeyOf(args.dropout);
  const int64_t scratch = AttentionScratchFloats(dims.seq, dims.head_dim(), true);
  ParallelItems(context.threads, dims.batch * dims.heads, [&](int thread) {
    return [&, thread](int64_t index) {
      AttentionHead head = HeadOf(args, dropout, index);
      head.scratch = Floats(ws, thread * scratch);
      kernel(head);
    };
  });
  if (!args.dbias) return absl::OkStatus();
  return AddColumnSums(context, ws, "AttentionBackward", args.dqkv, args.dbias);
}

}  // namespace lamina::cpu
