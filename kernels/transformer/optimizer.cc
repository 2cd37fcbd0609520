#include "optimizer.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "absl/strings/str_cat.h"
#include "status_macros.h"

namespace lamina {
namespace {

const char* Name(OptimizerKind kind) { return kind == OptimizerKind::kAdamW ? "AdamW" : "LAMB"; }

// 1 - beta^step, of the fp32 beta that the kernel uses: 1 - 0.999f is not 0.001f, and m and v are
// unbiased only if both sides mean the same beta. No cancellation where beta is next to one.
float BiasCorrection(float beta, int64_t step) {
  if (beta == 0.0f) return 1.0f;
  return static_cast<float>(
      -std::expm1(static_cast<double>(step) * std::log(static_cast<double>(beta))));
}

}  // namespace

absl::Status CheckOptions(const OptimizerOptions& o) {
  if (o.kind != OptimizerKind::kAdamW && o.kind != OptimizerKind::kLamb)
    return absl::InvalidArgumentError(absl::StrCat("optimizer kind is ", static_cast<int>(o.kind),
                                                   "; it must be AdamW (0) or LAMB (1)"));
  const auto invalid = [&](const char* name, double value, const char* range) {
    return absl::InvalidArgumentError(
        absl::StrCat(Name(o.kind), ": ", name, " is ", value, "; it must be ", range));
  };
  // The kernels take fp32. Each comparison is false for NaN.
  constexpr double kMax = std::numeric_limits<float>::max();
  constexpr double kMin = std::numeric_limits<float>::min();
  if (!(o.learning_rate >= 0.0 && o.learning_rate <= kMax))
    return invalid("learning_rate", o.learning_rate, "finite and >= 0");
  if (!(o.beta1 >= 0.0 && static_cast<float>(o.beta1) < 1.0f))
    return invalid("beta1", o.beta1, "in [0, 1)");
  if (!(o.beta2 >= 0.0 && static_cast<float>(o.beta2) < 1.0f))
    return invalid("beta2", o.beta2, "in [0, 1)");
  if (!(o.epsilon >= kMin && o.epsilon <= kMax))
    return invalid("epsilon", o.epsilon, "finite and > 0 in fp32");
  if (!(o.weight_decay >= 0.0 && o.weight_decay <= kMax))
    return invalid("weight_decay", o.weight_decay, "finite and >= 0");
  if (!(o.max_grad_norm >= 0.0 && o.max_grad_norm <= kMax))
    return invalid("max_grad_norm", o.max_grad_norm, "finite and >= 0 (0: no clipping)");
  if (!(o.loss_scale >= kMin && o.loss_scale <= kMax))
    return invalid("loss_scale", o.loss_scale, "finite and > 0 in fp32, or 0 for the stack's own");
  if (!(o.min_trust_ratio >= 0.0 && o.min_trust_ratio <= kMax))
    return invalid("min_trust_ratio", o.min_trust_ratio, "finite and >= 0");
  if (!(o.max_trust_ratio == 0.0 ||
        (o.max_trust_ratio >= o.min_trust_ratio && o.max_trust_ratio <= kMax)))
    return invalid("max_trust_ratio", o.max_trust_ratio,
                   "finite and >= min_trust_ratio, or 0 for no bound");
  if (o.kind != OptimizerKind::kLamb &&
      (o.adapt_biases_and_norms || o.min_trust_ratio != 0.0 || o.max_trust_ratio != 0.0))
    return absl::InvalidArgumentError(
        absl::StrCat(Name(o.kind), ": adapt_biases_and_norms, min_trust_ratio and max_trust_ratio ",
                     "are LAMB's; leave them unset"));
  return absl::OkStatus();
}

std::vector<LambSegment> LambSegments(const ParameterLayout& parameters,
                                      bool decay_biases_and_norms, bool adapt_biases_and_norms) {
  std::vector<LambSegment> segments;
  const auto count = static_cast<int64_t>(parameters.parameters().size());
  for (int64_t id = 0; id < count; ++id) {
    const int kind = static_cast<int>(id % kParametersPerLayer);
    const int64_t begin = parameters.Offset(id / kParametersPerLayer, kind);
    const bool matrix = IsMatrix(kParameterKinds[kind].role);
    segments.push_back({.begin = begin,
                        .end = begin + parameters.ShapeOf(kind).elements(),
                        .decay = matrix || decay_biases_and_norms ? 1 : 0,
                        .adapt = matrix || adapt_biases_and_norms ? 1 : 0});
  }
  std::sort(segments.begin(), segments.end(),
            [](const LambSegment& a, const LambSegment& b) { return a.begin < b.begin; });
  return segments;
}

absl::Status OptimizerStep::Enqueue(const Workspace& workspace, const OptimizerBuffers& buffers,
                                    const OptimizerOptions& options, int64_t step) {
  LAMINA_RETURN_IF_ERROR(
      backend_.GradientStats(workspace, {.grad = buffers.gradients,
                                         .loss_scale = static_cast<float>(options.loss_scale),
                                         .max_norm = static_cast<float>(options.max_grad_norm),
                                         .control = buffers.control}));
  return options.kind == OptimizerKind::kAdamW ? AdamW(workspace, buffers, options, step)
                                               : Lamb(workspace, buffers, options, step);
}

absl::Status OptimizerStep::AdamW(const Workspace& workspace, const OptimizerBuffers& buffers,
                                  const OptimizerOptions& options, int64_t step) {
  const auto update = [&](int64_t begin, int64_t end, double weight_decay) {
    const bool separate_weights = buffers.weights.data != buffers.master.data;
    return backend_.AdamW(
        workspace, {.master = buffers.master.Rows(begin, end),
                    .weights = separate_weights ? buffers.weights.Rows(begin, end) : TensorView{},
                    .grad = buffers.gradients.Rows(begin, end),
                    .m = buffers.m.Rows(begin, end),
                    .v = buffers.v.Rows(begin, end),
                    .lr = static_cast<float>(options.learning_rate),
                    .beta1 = static_cast<float>(options.beta1),
                    .beta2 = static_cast<float>(options.beta2),
                    .eps = static_cast<float>(options.epsilon),
                    .weight_decay = static_cast<float>(weight_decay),
                    .correction1 = BiasCorrection(static_cast<float>(options.beta1), step),
                    .correction2 = BiasCorrection(static_cast<float>(options.beta2), step),
                    .control = buffers.control});
  };
  const int64_t matrices = parameters_.decayed_elements();
  LAMINA_RETURN_IF_ERROR(update(0, matrices, options.weight_decay));
  return update(matrices, parameters_.elements(),
                options.decay_biases_and_norms ? options.weight_decay : 0.0);
}

absl::Status OptimizerStep::Lamb(const Workspace& workspace, const OptimizerBuffers& buffers,
                                 const OptimizerOptions& options, int64_t step) {
  const std::pair wanted{options.decay_biases_and_norms, options.adapt_biases_and_norms};
  if (written_segments_.empty() || written_for_ != wanted) {
    // The copy of the ones before is done: every step ends with a synchronisation.
    written_segments_ = LambSegments(parameters_, wanted.first, wanted.second);
    written_for_ = wanted;
    const absl::Status written = backend_.CopyIn(buffers.segments, written_segments_.data(),
                                                 written_segments_.size() * sizeof(LambSegment));
    if (!written.ok()) {
      ForgetBuffers();
      return written;
    }
  }
  const bool separate_weights = buffers.weights.data != buffers.master.data;
  return backend_.Lamb(workspace,
                       {.master = buffers.master,
                        .weights = separate_weights ? buffers.weights : TensorView{},
                        .grad = buffers.gradients,
                        .m = buffers.m,
                        .v = buffers.v,
                        .segments = buffers.segments,
                        .segment_count = static_cast<int64_t>(written_segments_.size()),
                        .lr = static_cast<float>(options.learning_rate),
                        .beta1 = static_cast<float>(options.beta1),
                        .beta2 = static_cast<float>(options.beta2),
                        .eps = static_cast<float>(options.epsilon),
                        .weight_decay = static_cast<float>(options.weight_decay),
                        .correction1 = BiasCorrection(static_cast<float>(options.beta1), step),
                        .correction2 = BiasCorrection(static_cast<float>(options.beta2), step),
                        .min_ratio = static_cast<float>(options.min_trust_ratio),
                        .max_ratio = static_cast<float>(options.max_trust_ratio),
                        .control = buffers.control});
}

}  // namespace lamina
