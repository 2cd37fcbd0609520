#include "norm.h"

#include <algorithm>

namespace lamina::cpu {
namespace {

// Per thread: a row of factors and a row of sums, of act.
size_t ForwardBytes(int64_t h, int threads) {
  return static_cast<size_t>(threads * 2 * Padded(h)) * sizeof(float);
}
// Per thread a row of factors and one of 1 / gamma; per chunk three rows of column sums.
size_t BackwardBytes(int64_t h, int64_t chunks, int threads) {
  return static_cast<size_t>((2 * threads + 3 * chunks) * Padded(h)) * sizeof(float);
}

struct Norm {
  const char* op;
  DType act;
  int64_t tokens;
};

absl::Status Run(const Context& context, const Workspace& ws, const Norm& norm,
                 const DropoutAddNormRows& rows) {
  const absl::Status enough = NeedWorkspace(norm.op, ws, ForwardBytes(rows.h, context.threads));
  if (!enough.ok()) return enough;
  const auto kernel = context.kernels.of(norm.act).dropout_add_norm;
  ParallelRanges(context.threads, norm.tokens, RowGrain(rows.h),
                 [&](int thread, int64_t begin, int64_t end) {
                   kernel(rows, begin, end, Floats(ws, thread * 2 * Padded(rows.h)));
                 });
  return absl::OkStatus();
}

// The column sums are added to these; null: not wanted.
struct ColumnGradients {
  float* dbias = nullptr;
  float* dgamma = nullptr;
  float* dbeta = nullptr;
};

absl::Status RunBackward(const Context& context, const Workspace& ws, const Norm& norm,
                         const DropoutAddNormBackwardRows& rows, const ColumnGradients& columns) {
  const RowChunks chunks(norm.tokens);
  const int64_t stride = Padded(rows.h), count = chunks.count();
  const absl::Status enough =
      NeedWorkspace(norm.op, ws, BackwardBytes(rows.h, count, context.threads));
  if (!enough.ok()) return enough;
  const auto kernel = context.kernels.of(norm.act).dropout_add_norm_backward;
  float* dbias = Floats(ws, context.threads * 2 * stride);
  float* dgamma = dbias + count * stride;
  float* dbeta = dgamma + count * stride;
  ParallelRanges(context.threads, count, RowGrain(rows.h * chunks.size),
                 [&](int thread, int64_t begin, int64_t end) {
                   for (int64_t c = begin; c < end; ++c) {
                     DropoutAddNormBackwardRows chunk = rows;
                     if (columns.dbias != nullptr) chunk.dbias = dbias + c * stride;
                     if (columns.dgamma != nullptr) chunk.dgamma = dgamma + c * stride;
                     if (columns.dbeta != nullptr) chunk.dbeta = dbeta + c * stride;
                     kernel(chunk, chunks.begin(c), chunks.end(c), Floats(ws, thread * 2 * stride));
                   }
                 });
  const auto finish = [&](float* partials, float* out) {
    if (out != nullptr) AddPartials(context.kernels, partials, count, stride, rows.h, out);
  };
  finish(dbias, columns.dbias);
  finish(dgamma, columns.dgamma);
  finish(dbeta, columns.dbeta);
  return absl::OkStatus();
}

}  // namespace

size_t NormWorkspaceBytes(const LayerDims& dims, int threads) {
  return std::max(ForwardBytes(dims.hidden, threads),
                  BackwardBytes(dims.hidden, RowChunks::Bound(dims.tokens()), threads));
}

absl::Status LayerNorm(const Context& context, const Workspace& ws, const LayerNormArgs& args) {
  return Run(context, ws, {"LayerNorm", args.x.dtype, args.x.shape[0]},
             {.x = args.x.data,
              .gamma = args.gamma.data,
              .beta = args.beta.data,
              .eps = args.eps,
              .y = args.y.data,
              .mean = args.mean.as<float>(),
              .rstd = args.rstd.as<float>(),
              .h = args.x.shape[1]});
}

absl::Status LayerNormBackward(const Context& context, const Workspace& ws,
                               const LayerNormBackwardArgs& args) {
  return RunBackward(context, ws, {"LayerNormBackward", args.dy.dtype, args.dy.shape[0]},
                     {.dy = args.dy.data,
                      .dsum = args.residual_grad.data,
                      .sum = args.x.data,
                      .y = args.y.data,
                      .beta = args.beta.data,
                      .y_again = args.y_again.data,
                      .gamma = args.gamma.data,
                      .mean = args.mean.as<float>(),
                      .rstd = args.rstd.as<float>(),
                      .dx = args.dx.data,
                      .h = args.dy.shape[1]},
                     {.dgamma = args.dgamma.as<float>(), .dbeta = args.dbeta.as<float>()});
}

absl::Status DropoutAddNorm(const Context& context, const Workspace& ws,
                            const DropoutAddNormArgs& args) {
  return Run(context, ws, {"DropoutAddNorm", args.x.dtype, args.x.shape[0]},
             {.x = args.x.data,
              .bias = args.bias.data,
              .residual = args.residual.data,
              .dropout = KeyOf(args.dropout),
              .sum = args.sum.data,
              .gamma = args.gamma.data,
              .beta = args.beta.data,
              .eps = args.eps,
              .y = args.y.data,
              .mean = args.mean.as<float>(),
              .rstd = args.rstd.as<float>(),
              .h = args.x.shape[1]});
}

absl::Status DropoutAddNormBackward(const Context& context, const Workspace& ws,
                                    const DropoutAddNormBackwardArgs& args) {
  return RunBackward(context, ws, {"DropoutAddNormBackward", args.dx.dtype, args.dx.shape[0]},
                     {.dy = args.dy.data,
                      .dsum = args.dsum.data,
                      .sum = args.sum.data,
                      .y = args.y.data,
                      .beta = args.beta.data,
                      .y_again = args.y_again.data,
                      .gamma = args.gamma.data,
                      .mean = args.mean.as<float>(),
                      .rstd = args.rstd.as<float>(),
                      .dropout = KeyOf(args.dropout),
                      .dresidual = args.dresidual.data,
                      .dx = args.dx.data,
                      .h = args.dx.shape[1]},
                     {.dbias = args.dbias.as<float>(),
                      .dgamma = args.dgamma.as<float>(),
                      .dbeta = args.dbeta.as<float>()});
}

}  // namespace lamina::cpu
