#include "optimizer.h"

#include <algorithm>
#include <cmath>

namespace lamina::cpu {
namespace {

constexpr int64_t kMostChunks = 1024;
constexpr int64_t kLeastChunk = 4096;

}  // namespace

size_t GradientStatsWorkspaceBytes() { return kMostChunks * sizeof(double); }

absl::Status GradientStats(const Context& context, const Workspace& ws,
                           const GradientStatsArgs& args) {
  const int64_t n = args.grad.elements();
  const int64_t size = std::max(kLeastChunk, (n + kMostChunks - 1) / kMostChunks);
  const int64_t chunks = (n + size - 1) / size;
  const absl::Status enough =
      NeedWorkspace("GradientStats", ws, static_cast<size_t>(chunks) * sizeof(double));
  if (!enough.ok()) return enough;
  double* partials = static_cast<double*>(ws.data);
  const float* grad = args.grad.as<float>();
  ParallelRanges(context.threads, chunks, std::max<int64_t>(1, 32768 / size),
                 [&](int, int64_t begin, int64_t end) {
                   for (int64_t c = begin; c < end; ++c)
                     partials[c] =
                         context.kernels.sum_squares(grad + c * size, std::min(size, n - c * size));
                 });
  double sum = 0.0;
  for (int64_t c = 0; c < chunks; ++c) sum += partials[c];
  const double loss_scale = double{args.loss_scale};
  const double norm = std::sqrt(sum) / loss_scale;
  const double max_norm = double{args.max_norm};
  const double clip = max_norm > 0.0 && norm > max_norm ? max_norm / norm : 1.0;
  *args.control = OptimizerControl{.grad_scale = static_cast<float>(clip / loss_scale),
                                   .grad_norm = static_cast<float>(norm),
                                   .skip = std::isfinite(sum) ? 0 : 1,
                                   .reserved = 0};
  return absl::OkStatus();
}

absl::Status AdamW(const Context& context, const AdamWArgs& args) {
  if (args.control->skip != 0) return absl::OkStatus();
  const AdamWElements elements{.master = args.master.as<float>(),
                               .weights = args.weights.data,
                               .grad = args.grad.as<float>(),
                               .m = args.m.as<float>(),
                               .v = args.v.as<float>(),
                               .grad_scale = args.control->grad_scale,
                               .lr = args.lr,
                               .beta1 = args.beta1,
                               .beta2 = args.beta2,
                               .eps = args.eps,
                               .weight_decay = args.weight_decay,
                               .correction1 = args.correction1,
                               .correction2 = args.correction2};
  const auto kernel = context.kernels.of(args.weights ? args.weights.dtype : DType::kF32).adamw;
  // A vector's worth is the unit: where a range ends must not decide how an element is computed.
  const int64_t n = args.master.elements(), units = (n + kPad - 1) / kPad;
  ParallelRanges(context.threads, units, 256, [&](int, int64_t begin, int64_t end) {
    kernel(elements, begin * kPad, std::min(n, end * kPad));
  });
  return absl::OkStatus();
}

}  // namespace lamina::cpu
