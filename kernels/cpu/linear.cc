// fp32 goes to the products as it is. bf16 does where the processor multiplies it (bf16 in, fp32
// accumulators, one rounding); elsewhere, and for fp16, blocks of rows are converted to fp32 in the
// workspace, multiplied there, and rounded on the way out.
#include "linear.h"

#include <algorithm>

namespace lamina::cpu {
namespace {

constexpr int64_t kBlockRows = 256;  // converted at a time
constexpr int64_t kCastGrain = 32768;

void ToF32(const Context& context, const TensorView& src, int64_t begin, int64_t count,
           float* dst) {
  const char* from = src.as<char>() + static_cast<size_t>(begin) * SizeOf(src.dtype);
  const size_t size = SizeOf(src.dtype);
  const auto convert = context.kernels.of(src.dtype).to_f32;
  ParallelRanges(context.threads, count, kCastGrain, [&](int, int64_t b, int64_t e) {
    convert(from + static_cast<size_t>(b) * size, dst + b, e - b);
  });
}

void* RowAt(const TensorView& t, int64_t row) {
  return t ? t.as<char>() + static_cast<size_t>(row * t.shape[1]) * SizeOf(t.dtype) : nullptr;
}

bool Native(const Context& context, DType t) {
  return t == DType::kF32 || (t == DType::kBF16 && context.products.bf16());
}

size_t FloatBytes(int64_t count) { return static_cast<size_t>(count) * sizeof(float); }

}  // namespace

size_t LinearWorkspaceBytes(const LayerDims& dims) {
  const int64_t widest = std::max(3 * dims.hidden, dims.intermediate);
  if (dims.dtype == DType::kF32) return 0;
  const int64_t rows = std::min(kBlockRows, dims.tokens());
  return FloatBytes(widest * dims.hidden + rows * 2 * widest);
}

absl::Status Linear(const Context& context, const Workspace& ws, const LinearArgs& args) {
  const int64_t t = args.x.shape[0], k = args.x.shape[1], n = args.w.shape[0];
  const DType act = args.x.dtype;
  const ActKernels& kernels = context.kernels.of(act);
  const bool native = Native(context, act);

  if (native && (act == DType::kF32 || !args.apply_gelu)) {
    void* product = args.pre ? args.pre.data : args.y.data;
    const absl::Status status = context.products.Multiply({.m = t,
                                                           .n = n,
                                                           .k = k,
                                                           .in = act,
                                                           .out = act,
                                                           .a = args.x.data,
                                                           .b = args.w.data,
                                                           .transpose_b = true,
                                                           .bias = args.bias.data,
                                                           .c = product});
    if (!status.ok() || !args.apply_gelu) return status;
    const BiasGeluRows rows{
        .x = product, .y = args.y.data, .n = n, .tanh = args.gelu == GeluKind::kTanh, .gelu = true};
    ParallelRanges(context.threads, t, RowGrain(n),
                   [&](int, int64_t b, int64_t e) { kernels.bias_gelu(rows, b, e); });
    return absl::OkStatus();
  }

  // The product in fp32, block by block; GELU sees it before it is rounded.
  const int64_t block = std::min(t, kBlockRows);
  const int64_t converted = native ? 0 : n * k + block * k;
  const absl::Status enough = NeedWorkspace("Linear", ws, FloatBytes(converted + block * n));
  if (!enough.ok()) return enough;
  float* product = Floats(ws);
  float* x = product + block * n;
  float* w = x + block * k;
  if (!native) ToF32(context, args.w, 0, n * k, w);
  for (int64_t row = 0; row < t; row += block) {
    const int64_t rows = std::min(block, t - row);
    if (!native) ToF32(context, args.x, row * k, rows * k, x);
    const absl::Status status = context.products.Multiply({.m = rows,
                                                           .n = n,
                                                           .k = k,
                                                           .in = native ? act : DType::kF32,
                                                           .a = native ? RowAt(args.x, row) : x,
                                                           .b = native ? args.w.data : w,
                                                           .transpose_b = true,
                                                           .c = product});
    if (!status.ok()) return status;
    const BiasGeluRows epilogue{.x = product,
                                .bias = args.bias.data,
                                .pre = RowAt(args.pre, row),
                                .y = RowAt(args.y, row),
                                .n = n,
                                .tanh = args.gelu == GeluKind::kTanh,
                                .gelu = args.apply_gelu};
    ParallelRanges(context.threads, rows, RowGrain(n),
                   [&](int, int64_t b, int64_t e) { kernels.bias_gelu_f32(epilogue, b, e); });
  }
  return absl::OkStatus();
}

absl::Status LinearInputGrad(const Context& context, const Workspace& ws,
                             const LinearInputGradArgs& args) {
  const int64_t t = args.dy.shape[0], n = args.dy.shape[1], k = args.w.shape[1];
  const DType act = args.dy.dtype;
  if (Native(context, act))
    return context.products.Multiply({.m = t,
                                      .n = k,
                                      .k = n,
                                      .in = act,
                                      .out = act,
                                      .a = args.dy.data,
                                      .b = args.w.data,
                                      .c = args.dx.data,
                                      .accumulate = args.accumulate});

  const ActKernels& kernels = context.kernels.of(act);
  const int64_t block = std::min(t, kBlockRows);
  const absl::Status enough =
      NeedWorkspace("LinearInputGrad", ws, FloatBytes(n * k + block * (n + k)));
  if (!enough.ok()) return enough;
  float* dx = Floats(ws);
  float* dy = dx + block * k;
  float* w = dy + block * n;
  ToF32(context, args.w, 0, n * k, w);
  for (int64_t row = 0; row < t; row += block) {
    const int64_t rows = std::min(block, t - row);
    ToF32(context, args.dy, row * n, rows * n, dy);
    if (args.accumulate) ToF32(context, args.dx, row * k, rows * k, dx);
    const absl::Status status = context.products.Multiply(
        {.m = rows, .n = k, .k = n, .a = dy, .b = w, .c = dx, .accumulate = args.accumulate});
    if (!status.ok()) return status;
    ParallelRanges(context.threads, rows, RowGrain(k), [&](int, int64_t b, int64_t e) {
      kernels.from_f32(dx + b * k, RowAt(args.dx, row + b), (e - b) * k);
    });
  }
  return absl::OkStatus();
}

absl::Status LinearWeightGrad(const Context& context, const Workspace& ws,
                              const LinearWeightGradArgs& args) {
  const int64_t t = args.dy.shape[0], n = args.dy.shape[1], k = args.x.shape[1];
  const DType act = args.dy.dtype;
  if (Native(context, act))
    return context.products.Multiply({.m = n,
                                      .n = k,
                                      .k = t,
                                      .in = act,
                                      .a = args.dy.data,
                                      .transpose_a = true,
                                      .b = args.x.data,
                                      .c = args.dw.data,
                                      .accumulate = true});

  const int64_t block = std::min(t, kBlockRows);
  const absl::Status enough = NeedWorkspace("LinearWeightGrad", ws, FloatBytes(block * (n + k)));
  if (!enough.ok()) return enough;
  float* dy = Floats(ws);
  float* x = dy + block * n;
  for (int64_t row = 0; row < t; row += block) {
    const int64_t rows = std::min(block, t - row);
    ToF32(context, args.dy, row * n, rows * n, dy);
    ToF32(context, args.x, row * k, rows * k, x);
    const absl::Status status = context.products.Multiply({.m = n,
                                                           .n = k,
                                                           .k = rows,
                                                           .a = dy,
                                                           .transpose_a = true,
                                                           .b = x,
                                                           .c = args.dw.data,
                                                           .accumulate = true});
    if (!status.ok()) return status;
  }
  return absl::OkStatus();
}

}  // namespace lamina::cpu
