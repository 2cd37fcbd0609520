// Bias, dropout, residual and layer norm, row by row, and their gradients.
#pragma once

#include "simd/dropout_lanes.h"

namespace lamina::cpu::LAMINA_CPU_ISA_NAMESPACE {

template <typename E>
LAMINA_INLINE const E* Row(const void* matrix, int64_t r, int64_t h) {
  return matrix != nullptr ? static_cast<const E*>(matrix) + r * h : nullptr;
}
template <typename E>
LAMINA_INLINE E* Row(void* matrix, int64_t r, int64_t h) {
  return matrix != nullptr ? static_cast<E*>(matrix) + r * h : nullptr;
}

// The norm's output. Backward makes it again, of the same numbers and so to the bit.
LAMINA_INLINE F NormOutput(F normalised, F gamma, F beta) { return normalised * gamma + beta; }

template <typename E>
void DropoutAddNorm(const DropoutAddNormRows& a, int64_t begin, int64_t end, float* scratch) {
  const int64_t h = a.h;
  const float per_h = 1.0f / static_cast<float>(h);
  float* factors = scratch;
  E* row = reinterpret_cast<E*>(scratch + Padded(h));
  const E* bias = static_cast<const E*>(a.bias);
  const E* gamma = static_cast<const E*>(a.gamma);
  const E* beta = static_cast<const E*>(a.beta);
  for (int64_t r = begin; r < end; ++r) {
    const E* x = Row<E>(a.x, r, h);
    const E* residual = Row<E>(a.residual, r, h);
    E* sum = a.sum != nullptr ? Row<E>(a.sum, r, h) : row;
    if (a.dropout.on) FactorRow(a.dropout, static_cast<uint64_t>(r), h, factors);
    F total{};
    Lanes(h, [&](int64_t j, auto part) {
      F v = Load(x + j, part);
      if (bias != nullptr) v += Load(bias + j, part);
      if (a.dropout.on) v *= Load(factors + j, part);
      if (residual != nullptr) v += Load(residual + j, part);
      Store(sum + j, v, part);
      total += Load(sum + j, part);  // as act has it: the norm's input
    });
    if (gamma == nullptr) continue;
    const float mean = Sum(total) * per_h;
    F squares{};
    Lanes(h, [&](int64_t j, auto part) {
      const F centred = Keep(Load(sum + j, part) - mean, 0.0f, part);
      squares += centred * centred;
    });
    const float rstd = 1.0f / __builtin_sqrtf(Sum(squares) * per_h + a.eps);
    E* y = Row<E>(a.y, r, h);
    Lanes(h, [&](int64_t j, auto part) {
      const F xhat = (Load(sum + j, part) - mean) * rstd;
      Store(y + j, NormOutput(xhat, Load(gamma + j, part), Load(beta + j, part)), part);
    });
    if (a.mean != nullptr) a.mean[r] = mean;
    if (a.rstd != nullptr) a.rstd[r] = rstd;
  }
}

template <typename E>
void DropoutAddNormBackward(const DropoutAddNormBackwardRows& a, int64_t begin, int64_t end,
                            float* scratch) {
  const int64_t h = a.h;
  const float per_h = 1.0f / static_cast<float>(h);
  const E* gamma = static_cast<const E*>(a.gamma);
  const E* beta = static_cast<const E*>(a.beta);
  float* factors = scratch;
  float* per_gamma = scratch + Padded(h);
  const bool from_output = a.dy != nullptr && a.sum == nullptr;
  if (from_output)
    Lanes(h,
          [&](int64_t j, auto part) { Store(per_gamma + j, 1.0f / Load(gamma + j, part), part); });
  float* const columns[] = {a.dbias, a.dgamma, a.dbeta};
  for (float* column : columns)
    if (column != nullptr)
      for (int64_t j = 0; j < h; ++j) column[j] = 0.0f;
  for (int64_t r = begin; r < end; ++r) {
    const E* dy = Row<E>(a.dy, r, h);
    const E* dsum = Row<E>(a.dsum, r, h);
    const E* x = Row<E>(a.sum, r, h);
    const E* y = Row<E>(a.y, r, h);
    E* y_again = Row<E>(a.y_again, r, h);
    E* dresidual = Row<E>(a.dresidual, r, h);
    E* dx = Row<E>(a.dx, r, h);
    if (a.dropout.on) FactorRow(a.dropout, static_cast<uint64_t>(r), h, factors);
    // With xhat the normalised values and g = dy * gamma:
    //   d(LayerNorm)/dx . dy = rstd * (g - average(g) - xhat * average(g * xhat))
    float mean = 0.0f, rstd = 0.0f, average_g = 0.0f, average_gx = 0.0f;
    const auto normalised = [&](int64_t j, auto part) {
      return from_output ? (Load(y + j, part) - Load(beta + j, part)) * Load(per_gamma + j, part)
                         : (Load(x + j, part) - mean) * rstd;
    };
    if (dy != nullptr) {
      if (!from_output) mean = a.mean[r];
      rstd = a.rstd[r];
      F sum_g{}, sum_gx{};
      Lanes(h, [&](int64_t j, auto part) {
        const F g = Load(dy + j, part) * Load(gamma + j, part);  // zero beyond the row
        sum_g += g;
        sum_gx += g * Keep(normalised(j, part), 0.0f, part);
      });
      average_g = Sum(sum_g) * per_h;
      average_gx = Sum(sum_gx) * per_h;
    }
    Lanes(h, [&](int64_t j, auto part) {
      F ds = dsum != nullptr ? Load(dsum + j, part) : F{};
      if (dy != nullptr) {
        const F d = Load(dy + j, part);
        const F xhat = normalised(j, part);
        ds += rstd * (d * Load(gamma + j, part) - average_g - xhat * average_gx);
        if (y_again != nullptr)
          Store(y_again + j, NormOutput(xhat, Load(gamma + j, part), Load(beta + j, part)), part);
        if (a.dgamma != nullptr) Store(a.dgamma + j, Load(a.dgamma + j, part) + d * xhat, part);
        if (a.dbeta != nullptr) Store(a.dbeta + j, Load(a.dbeta + j, part) + d, part);
      }
      if (dresidual != nullptr) {
        Store(dresidual + j, ds, part);
        ds = Load(dresidual + j, part);  // dx is of ds as stored
      }
      if (a.dropout.on) ds *= Load(factors + j, part);
      if (dx != nullptr) Store(dx + j, ds, part);
      if (a.dbias != nullptr) Store(a.dbias + j, Load(a.dbias + j, part) + ds, part);
    });
  }
}

}  // namespace lamina::cpu::LAMINA_CPU_ISA_NAMESPACE
