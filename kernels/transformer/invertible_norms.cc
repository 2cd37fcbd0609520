#include "invertible_norms.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "status_macros.h"

namespace lamina {
namespace {

struct Precision {
  double unit_roundoff;  // u
  double least_normal;   // N
};

Precision PrecisionOf(DType dtype) {
  switch (dtype) {
    case DType::kF16:
      return {0x1p-11, 0x1p-14};
    case DType::kBF16:
      return {0x1p-8, 0x1p-126};
    default:
      return {0x1p-24, 0x1p-126};
  }
}

int KindOf(absl::string_view name) {
  int kind = 0;
  while (name != kParameterKinds[kind].name) ++kind;
  return kind;
}

}  // namespace

double LeastInvertibleGamma(DType dtype, double beta) {
  const Precision p = PrecisionOf(dtype);
  const double allowed = std::sqrt(p.unit_roundoff);
  return std::max(std::abs(beta) * allowed, p.least_normal / allowed);
}

std::vector<float>& InvertibleNorms::vectors() {
  vectors_.resize(static_cast<size_t>(parameters_.elements() - parameters_.decayed_elements()));
  return vectors_;
}

absl::Status InvertibleNorms::JudgeNorm(int64_t layer, int gamma_kind, int beta_kind) const {
  const auto values = [&](int kind) {
    return vectors_.data() + (parameters_.Offset(layer, kind) - parameters_.decayed_elements());
  };
  const float* gamma = values(gamma_kind);
  const float* beta = values(beta_kind);
  const int64_t channels = parameters_.ShapeOf(gamma_kind).elements();
  for (int64_t c = 0; c < channels; ++c) {
    const double least = LeastInvertibleGamma(dtype_, double{beta[c]});
    if (std::abs(double{gamma[c]}) >= least) continue;  // false for NaN
    return absl::FailedPreconditionError(absl::StrCat(
        "Forward: normalize_invertible cannot invert layers.", layer, ".",
        kParameterKinds[gamma_kind].name, "[", c, "], which is ", gamma[c], ": beside ",
        kParameterKinds[beta_kind].name, "[", c, "] = ", beta[c], " its absolute value must be at ",
        "least ", least, " in ", Name(dtype_), "; turn normalize_invertible off (UpdateStack)"));
  }
  return absl::OkStatus();
}

void InvertibleNorms::Judge() {
  static const int attn_nw = KindOf("attn_nw"), attn_nb = KindOf("attn_nb");
  static const int norm_w = KindOf("norm_w"), norm_b = KindOf("norm_b");
  const auto layers = static_cast<int64_t>(parameters_.parameters().size()) / kParametersPerLayer;
  verdicts_.clear();
  for (int64_t layer = 0; layer < layers; ++layer) {
    absl::Status verdict = JudgeNorm(layer, attn_nw, attn_nb);
    verdict.Update(JudgeNorm(layer, norm_w, norm_b));
    verdicts_.push_back(std::move(verdict));
  }
  stale_ = false;
}

absl::Status InvertibleNorms::Check(LayerRange layers) const {
  for (int64_t i = layers.begin; i < layers.end; ++i)
    LAMINA_RETURN_IF_ERROR(verdicts_[static_cast<size_t>(i)]);
  return absl::OkStatus();
}

}  // namespace lamina
