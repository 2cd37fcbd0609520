#include "gelu.h"

#include "column_sum.h"

namespace lamina::cpu {

size_t GeluWorkspaceBytes(const LayerDims& dims) {
  return ColumnSumWorkspaceBytes(dims.tokens(), dims.intermediate);
}

absl::Status Gelu(const Context& context, const GeluArgs& args) {
  const int64_t t = args.x.shape[0], n = args.x.shape[1];
  const BiasGeluRows rows{.x = args.x.data,
                          .slope = args.slope.data,
                          .y = args.y.data,
                          .n = n,
                          .tanh = args.gelu == GeluKind::kTanh,
                          .gelu = true};
  const ActKernels& kernels = context.kernels.of(args.x.dtype);
  ParallelRanges(context.threads, t, RowGrain(n),
                 [&](int, int64_t b, int64_t e) { kernels.bias_gelu(rows, b, e); });
  return absl::OkStatus();
}

absl::Status GeluBackward(const Context& context, const Workspace& ws,
                          const GeluBackwardArgs& args) {
  const RowChunks chunks(args.dy.shape[0]);
  const int64_t n = args.dy.shape[1], stride = Padded(n);
  const ActKernels& kernels = context.kernels.of(args.dy.dtype);
  if (args.dbias) {
    const absl::Status enough = NeedWorkspace(
        "GeluBackward", ws, static_cast<size_t>(chunks.count() * stride) * sizeof(float));
    if (!enough.ok()) return enough;
  }
  float* partials = args.dbias ? Floats(ws) : nullptr;
  const GeluBackwardRows rows{.slope = args.slope.data,
                              .x = args.x.data,
                              .y_again = args.y_again.data,
                              .dy = args.dy.data,
                              .dx = args.dx.data,
                              .n = n,
                              .tanh = args.gelu == GeluKind::kTanh};
  ParallelRanges(context.threads, chunks.count(), RowGrain(n * chunks.size),
                 [&](int, int64_t begin, int64_t end) {
                   for (int64_t c = begin; c < end; ++c) {
                     GeluBackwardRows chunk = rows;
                     if (partials != nullptr) chunk.column = partials + c * stride;
                     kernels.gelu_backward(chunk, chunks.begin(c), chunks.end(c));
                   }
                 });
  if (partials != nullptr)
    AddPartials(context.kernels, partials, chunks.count(), stride, n, args.dbias.as<float>());
  return absl::OkStatus();
}

}  // namespace lamina::cpu
