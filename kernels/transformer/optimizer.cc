#include "optimizer.h"

#include <cmath>
#include <limits>

#include "absl/strings/str_cat.h"
#include "status_macros.h"

namespace lamina {
namespace {

absl::Status Invalid(const char* name, double value, const char* range) {
  return absl::InvalidArgumentError(
      absl::StrCat("AdamW: ", name, " is ", value, "; it must be ", range));
}

// 1 - beta^step, of the fp32 beta that the kernel uses: 1 - 0.999f is not 0.001f, and m and v are
// unbiased only if both sides mean the same beta. No cancellation where beta is next to one.
float BiasCorrection(float beta, int64_t step) {
  if (beta == 0.0f) return 1.0f;
  return static_cast<float>(
      -std::expm1(static_cast<double>(step) * std::log(static_cast<double>(beta))));
}

}  // namespace

absl::Status CheckOptions(const AdamWOptions& o) {
  // The kernels take fp32. Each comparison is false for NaN.
  constexpr double kMax = std::numeric_limits<float>::max();
  constexpr double kMin = std::numeric_limits<float>::min();
  if (!(o.learning_rate >= 0.0 && o.learning_rate <= kMax))
    return Invalid("learning_rate", o.learning_rate, "finite and >= 0");
  if (!(o.beta1 >= 0.0 && static_cast<float>(o.beta1) < 1.0f))
    return Invalid("beta1", o.beta1, "in [0, 1)");
  if (!(o.beta2 >= 0.0 && static_cast<float>(o.beta2) < 1.0f))
    return Invalid("beta2", o.beta2, "in [0, 1)");
  if (!(o.epsilon >= kMin && o.epsilon <= kMax))
    return Invalid("epsilon", o.epsilon, "finite and > 0 in fp32");
  if (!(o.weight_decay >= 0.0 && o.weight_decay <= kMax))
    return Invalid("weight_decay", o.weight_decay, "finite and >= 0");
  if (!(o.max_grad_norm >= 0.0 && o.max_grad_norm <= kMax))
    return Invalid("max_grad_norm", o.max_grad_norm, "finite and >= 0 (0: no clipping)");
  if (!(o.loss_scale >= kMin && o.loss_scale <= kMax))
    return Invalid("loss_scale", o.loss_scale, "finite and > 0 in fp32");
  return absl::OkStatus();
}

absl::StatusOr<OptimizerControl> AdamWStep(Backend& backend, const Workspace& workspace,
                                           const OptimizerBuffers& buffers,
                                           const AdamWOptions& options, int64_t step) {
  LAMINA_RETURN_IF_ERROR(
      backend.GradientStats(workspace, {.grad = buffers.gradients,
                                        .loss_scale = static_cast<float>(options.loss_scale),
                                        .max_norm = static_cast<float>(options.max_grad_norm),
                                        .control = buffers.control}));
  const auto update = [&](int64_t begin, int64_t end, double weight_decay) {
    const bool separate_weights = buffers.weights.data != buffers.master.data;
    return backend.AdamW(
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
  const int64_t matrices = buffers.decayed_elements;
  LAMINA_RETURN_IF_ERROR(update(0, matrices, options.weight_decay));
  LAMINA_RETURN_IF_ERROR(update(matrices, buffers.master.shape[0],
                                options.decay_biases_and_norms ? options.weight_decay : 0.0));
  OptimizerControl control{};
  LAMINA_RETURN_IF_ERROR(backend.CopyOut(&control, buffers.control, sizeof(control)));
  LAMINA_RETURN_IF_ERROR(backend.Synchronize());
  return control;
}

}  // namespace lamina
