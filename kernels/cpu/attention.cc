#include "attention.h"

#include <algorithm>

namespace lamina::cpu {
namespace {

template <typename T>
T* At(const TensorView& t, int64_t element) {
  return reinterpret_cast<T*>(t.as<char>() + static_cast<size_t>(element) * SizeOf(t.dtype));
}

// What Forward and Backward read, of head `index` = b*A + a.
template <typename Args>
AttentionHead HeadOf(const Args& args, const DropoutKey& dropout, int64_t index) {
  const LayerDims& dims = args.dims;
  const int64_t b = index / dims.heads, a = index % dims.heads, d = dims.head_dim();
  const int64_t row = b * dims.seq;
  const int64_t q = row * 3 * dims.hidden + a * d;
  AttentionHead head{};
  head.q = At<void>(args.qkv, q);
  head.k = At<void>(args.qkv, q + dims.hidden);
  head.v = At<void>(args.qkv, q + 2 * dims.hidden);
  head.qkv_stride = 3 * dims.hidden;
  head.s = dims.seq;
  head.d = d;
  head.keys = dims.seq;
  if (args.lengths)  // clamped: a length out of range must not become an address
    head.keys = std::clamp<int64_t>(args.lengths.template as<int32_t>()[b], 0, dims.seq);
  if (args.mask) head.mask = args.mask.template as<float>() + row;
  head.scale = args.scale;
  head.dropout = dropout;
  head.first_row = static_cast<uint64_t>(index) * static_cast<uint64_t>(dims.seq);
  if (args.saved) head.saved = reinterpret_cast<float*>(args.saved.data) + index * 2 * dims.seq;
  head.out_stride = dims.hidden;
  return head;
}

size_t ScratchBytes(const LayerDims& dims, int threads, bool backward) {
  return static_cast<size_t>(threads *
                             AttentionScratchFloats(dims.seq, dims.head_dim(), backward)) *
         sizeof(float);
}

}  // namespace

size_t AttentionSaved(const LayerDims& dims) {
  return static_cast<size_t>(dims.batch * dims.heads * dims.seq) * 2 * sizeof(float);
}

size_t AttentionWorkspaceBytes(const LayerDims& dims, int threads) {
  return ScratchBytes(dims, threads, true);
}

absl::Status Attention(const Context& context, const Workspace& ws, const AttentionArgs& args) {
  const LayerDims& dims = args.dims;
  const absl::Status enough =
      NeedWorkspace("Attention", ws, ScratchBytes(dims, context.threads, false));
  if (!enough.ok()) return enough;
  const auto kernel = context.kernels.of(args.qkv.dtype).attention;
  const DropoutKey dropout = KeyOf(args.dropout);
  const int64_t scratch = AttentionScratchFloats(dims.seq, dims.head_dim(), false);
  // Whole heads first; where there are fewer than threads, blocks of queries.
  const int64_t heads = dims.batch * dims.heads;
  const int64_t all_blocks = (dims.seq + kQueryBlock - 1) / kQueryBlock;
  const int64_t wanted = (context.threads + heads - 1) / heads;
  const int64_t parts = std::min(all_blocks, std::max<int64_t>(1, wanted));
  ParallelRanges(context.threads, heads * parts, 1, [&](int thread, int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t index = item / parts, part = item % parts;
      AttentionHead head = HeadOf(args, dropout, index);
      head.scratch = Floats(ws, thread * scratch);
      head.out = At<void>(
          args.out, index / dims.heads * dims.seq * dims.hidden + index % dims.heads * head.d);
      const int64_t first = all_blocks * part / parts * kQueryBlock;
      const int64_t last = std::min(dims.seq, all_blocks * (part + 1) / parts * kQueryBlock);
      kernel(head, first, last, /*pack=*/item == begin || part == 0);
    }
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
  ParallelRanges(context.threads, dims.batch * dims.heads, 1,
                 [&](int thread, int64_t begin, int64_t end) {
                   for (int64_t index = begin; index < end; ++index) {
                     AttentionHead head = HeadOf(args, dropout, index);
                     const int64_t row = index / dims.heads * dims.seq;
                     const int64_t column = index % dims.heads * head.d;
                     const int64_t q = row * 3 * dims.hidden + column;
                     head.scratch = Floats(ws, thread * scratch);
                     head.dout = At<void>(args.dout, row * dims.hidden + column);
                     head.dq = At<void>(args.dqkv, q);
                     head.dk = At<void>(args.dqkv, q + dims.hidden);
                     head.dv = At<void>(args.dqkv, q + 2 * dims.hidden);
                     kernel(head);
                   }
                 });
  return absl::OkStatus();
}

}  // namespace lamina::cpu
