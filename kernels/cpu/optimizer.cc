#include "optimizer.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace lamina::cpu {
namespace {

constexpr int64_t kMostChunks = 1024;
constexpr int64_t kLeastChunk = 4096;

// Reductions go chunk by chunk, and the chunks' sums are added in order: the bits depend on n
// alone.
struct Chunks {
  explicit Chunks(int64_t all)
      : n(all), size(std::max(kLeastChunk, (all + kMostChunks - 1) / kMostChunks)) {}
  int64_t count() const { return (n + size - 1) / size; }
  int64_t begin(int64_t chunk) const { return chunk * size; }
  int64_t end(int64_t chunk) const { return std::min(n, (chunk + 1) * size); }
  int64_t grain() const { return std::max<int64_t>(1, 32768 / size); }

  int64_t n;
  int64_t size;
};

// 1 where either norm is 0.
double TrustRatio(const LambArgs& args, const LambSquares& squares) {
  if (!(squares.weight > 0.0 && squares.update > 0.0)) return 1.0;
  const double ratio = std::max(std::sqrt(squares.weight / squares.update), double{args.min_ratio});
  return args.max_ratio > 0.0f ? std::min(ratio, double{args.max_ratio}) : ratio;
}

}  // namespace

size_t GradientStatsWorkspaceBytes() { return kMostChunks * sizeof(double); }
size_t LambWorkspaceBytes() { return kMostChunks * sizeof(LambSquares); }

absl::Status GradientStats(const Context& context, const Workspace& ws,
                           const GradientStatsArgs& args) {
  const Chunks chunks(args.grad.elements());
  const int64_t count = chunks.count();
  const absl::Status enough =
      NeedWorkspace("GradientStats", ws, static_cast<size_t>(count) * sizeof(double));
  if (!enough.ok()) return enough;
  double* partials = static_cast<double*>(ws.data);
  const float* grad = args.grad.as<float>();
  ParallelRanges(context.threads, count, chunks.grain(), [&](int, int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c)
      partials[c] =
          context.kernels.sum_squares(grad + chunks.begin(c), chunks.end(c) - chunks.begin(c));
  });
  double sum = 0.0;
  for (int64_t c = 0; c < count; ++c) sum += partials[c];
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

absl::Status Lamb(const Context& context, const Workspace& ws, const LambArgs& args) {
  const absl::Status enough = NeedWorkspace("Lamb", ws, LambWorkspaceBytes());
  if (!enough.ok()) return enough;
  if (args.control->skip != 0) return absl::OkStatus();
  auto* partials = static_cast<LambSquares*>(ws.data);
  const auto moments = context.kernels.lamb_moments;
  const auto step = context.kernels.of(args.weights ? args.weights.dtype : DType::kF32).lamb_step;
  const int64_t n = args.master.elements();
  for (int64_t s = 0; s < args.segment_count; ++s) {
    const LambSegment& segment = args.segments[s];
    // Clamped: numbers out of range must not become addresses.
    const int64_t first = std::clamp<int64_t>(segment.begin, 0, n);
    const Chunks chunks(std::clamp<int64_t>(segment.end, first, n) - first);
    const LambElements elements{.master = args.master.as<float>(),
                                .weights = args.weights.data,
                                .grad = args.grad.as<float>(),
                                .m = args.m.as<float>(),
                                .v = args.v.as<float>(),
                                .grad_scale = args.control->grad_scale,
                                .beta1 = args.beta1,
                                .beta2 = args.beta2,
                                .eps = args.eps,
                                .weight_decay = segment.decay != 0 ? args.weight_decay : 0.0f,
                                .correction1 = args.correction1,
                                .correction2 = args.correction2};
    const bool adapt = segment.adapt != 0;
    ParallelRanges(
        context.threads, chunks.count(), chunks.grain(), [&](int, int64_t begin, int64_t end) {
          for (int64_t c = begin; c < end; ++c) {
            partials[c] = moments(elements, first + chunks.begin(c), first + chunks.end(c));
            // No need to wait for the norms: the chunk is still in the cache.
            if (!adapt) step(elements, first + chunks.begin(c), first + chunks.end(c), args.lr);
          }
        });
    if (!adapt) continue;
    LambSquares all;
    for (int64_t c = 0; c < chunks.count(); ++c) {
      all.weight += partials[c].weight;
      all.update += partials[c].update;
    }
    // Finite, so that a vanishing update is not multiplied by infinity.
    const auto lr = static_cast<float>(std::min(double{args.lr} * TrustRatio(args, all),
                                                double{std::numeric_limits<float>::max()}));
    ParallelRanges(context.threads, chunks.count(), chunks.grain(),
                   [&](int, int64_t begin, int64_t end) {
                     for (int64_t c = begin; c < end; ++c)
                       step(elements, first + chunks.begin(c), first + chunks.end(c), lr);
                   });
  }
  return absl::OkStatus();
}

}  // namespace lamina::cpu
