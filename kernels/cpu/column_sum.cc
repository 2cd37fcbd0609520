#include "column_sum.h"

namespace lamina::cpu {

size_t ColumnSumWorkspaceBytes(int64_t rows, int64_t columns) {
  return static_cast<size_t>(RowChunks::Bound(rows) * Padded(columns)) * sizeof(float);
}

absl::Status AddColumnSums(const Context& context, const Workspace& ws, const char* op,
                           const TensorView& x, const TensorView& out) {
  const RowChunks chunks(x.shape[0]);
  const int64_t n = x.shape[1], stride = Padded(n);
  const absl::Status enough =
      NeedWorkspace(op, ws, static_cast<size_t>(chunks.count() * stride) * sizeof(float));
  if (!enough.ok()) return enough;
  const auto column_sum = context.kernels.of(x.dtype).column_sum;
  float* partials = Floats(ws);
  ParallelRanges(context.threads, chunks.count(), RowGrain(n * chunks.size),
                 [&](int, int64_t begin, int64_t end) {
                   for (int64_t c = begin; c < end; ++c)
                     column_sum(x.data, n, chunks.begin(c), chunks.end(c), partials + c * stride);
                 });
  AddPartials(context.kernels, partials, chunks.count(), stride, n, out.as<float>());
  return absl::OkStatus();
}

}  // namespace lamina::cpu
