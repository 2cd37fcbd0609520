#include "ref/ops.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>

namespace lamina::ref {
namespace {

// Vectors are indexed by size_t and extents are int64_t; At keeps the loops below readable.
template <typename V>
auto& At(V& v, int64_t i) {
  return v[static_cast<size_t>(i)];
}

Vec Zeros(int64_t n) { return Vec(static_cast<size_t>(n), 0.0); }

}  // namespace

Vec DropoutFactors(const Mask& mask, int64_t rows, int64_t cols) {
  Vec factors(static_cast<size_t>(rows * cols), 1.0);
  if (mask.ratio == 0.0f) return factors;
  const uint32_t threshold = KeepThreshold(mask.ratio);
  const double scale = 65536.0 / threshold;
  Philox4 bits{};
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < cols; ++c) {
      if (c % 8 == 0)
        bits = DropoutBits(mask.rng, mask.stream, static_cast<uint64_t>(r),
                           static_cast<uint32_t>(c / 8));
      const bool keep = DropoutLane(bits, static_cast<uint32_t>(c % 8)) < threshold;
      At(factors, r * cols + c) = keep ? scale : 0.0;
    }
  return factors;
}

Vec Linear(const ProductShape& s, const Vec& x, const Vec& w, const Vec& bias) {
  Vec y = Zeros(s.t * s.n);
  for (int64_t t = 0; t < s.t; ++t)
    for (int64_t n = 0; n < s.n; ++n) {
      double sum = bias.empty() ? 0.0 : At(bias, n);
      for (int64_t k = 0; k < s.k; ++k) sum += At(x, t * s.k + k) * At(w, n * s.k + k);
      At(y, t * s.n + n) = sum;
    }
  return y;
}

Vec LinearInputGrad(const ProductShape& s, const Vec& dy, const Vec& w) {
  Vec dx = Zeros(s.t * s.k);
  for (int64_t t = 0; t < s.t; ++t)
    for (int64_t n = 0; n < s.n; ++n)
      for (int64_t k = 0; k < s.k; ++k)
        At(dx, t * s.k + k) += At(dy, t * s.n + n) * At(w, n * s.k + k);
  return dx;
}

Vec LinearWeightGrad(const ProductShape& s, const Vec& dy, const Vec& x) {
  Vec dw = Zeros(s.n * s.k);
  for (int64_t t = 0; t < s.t; ++t)
    for (int64_t n = 0; n < s.n; ++n)
      for (int64_t k = 0; k < s.k; ++k)
        At(dw, n * s.k + k) += At(dy, t * s.n + n) * At(x, t * s.k + k);
  return dw;
}

Vec ColumnSums(const Vec& m, int64_t rows, int64_t cols) {
  Vec sums = Zeros(cols);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < cols; ++c) At(sums, c) += At(m, r * cols + c);
  return sums;
}

double Gelu(GeluKind kind, double x) {
  if (kind == GeluKind::kErf) return 0.5 * x * (1.0 + std::erf(x / std::sqrt(2.0)));
  const double u = std::sqrt(2.0 / M_PI) * (x + 0.044715 * x * x * x);
  return 0.5 * x * (1.0 + std::tanh(u));
}

double GeluDerivative(GeluKind kind, double x) {
  if (kind == GeluKind::kErf) {
    const double distribution = 0.5 * (1.0 + std::erf(x / std::sqrt(2.0)));
    const double density = std::exp(-0.5 * x * x) / std::sqrt(2.0 * M_PI);
    return distribution + x * density;
  }
  const double u = std::sqrt(2.0 / M_PI) * (x + 0.044715 * x * x * x);
  const double du = std::sqrt(2.0 / M_PI) * (1.0 + 3.0 * 0.044715 * x * x);
  const double tanh_u = std::tanh(u);
  return 0.5 * (1.0 + tanh_u) + 0.5 * x * (1.0 - tanh_u * tanh_u) * du;
}

NormResult LayerNorm(const Vec& x, const Vec& gamma, const Vec& beta, double eps, int64_t t,
                     int64_t h) {
  NormResult result{Zeros(t * h), Zeros(t), Zeros(t)};
  for (int64_t r = 0; r < t; ++r) {
    double mean = 0.0;
    for (int64_t c = 0; c < h; ++c) mean += At(x, r * h + c);
    mean /= static_cast<double>(h);
    double variance = 0.0;
    for (int64_t c = 0; c < h; ++c) variance += std::pow(At(x, r * h + c) - mean, 2);
    variance /= static_cast<double>(h);
    const double rstd = 1.0 / std::sqrt(variance + eps);
    for (int64_t c = 0; c < h; ++c)
      At(result.y, r * h + c) = (At(x, r * h + c) - mean) * rstd * At(gamma, c) + At(beta, c);
    At(result.mean, r) = mean;
    At(result.rstd, r) = rstd;
  }
  return result;
}

Vec LayerNormOutput(const Vec& x, const Vec& gamma, const Vec& beta, const Vec& mean,
                    const Vec& rstd, int64_t t, int64_t h) {
  Vec y = Zeros(t * h);
  for (int64_t r = 0; r < t; ++r)
    for (int64_t c = 0; c < h; ++c)
      At(y, r * h + c) =
          (At(x, r * h + c) - At(mean, r)) * At(rstd, r) * At(gamma, c) + At(beta, c);
  return y;
}

NormGradients LayerNormBackward(const Vec& dy, const Vec& x, const Vec& gamma, const Vec& mean,
                                const Vec& rstd, int64_t t, int64_t h) {
  NormGradients result{Zeros(t * h), Zeros(h), Zeros(h)};
  for (int64_t r = 0; r < t; ++r) {
    // With xhat = (x - mean) * rstd and g = dy * gamma:
    //   dx = rstd * (g - average(g) - xhat * average(g * xhat))
    double average_g = 0.0, average_gx = 0.0;
    for (int64_t c = 0; c < h; ++c) {
      const double xhat = (At(x, r * h + c) - At(mean, r)) * At(rstd, r);
      const double g = At(dy, r * h + c) * At(gamma, c);
      average_g += g / static_cast<double>(h);
      average_gx += g * xhat / static_cast<double>(h);
    }
    for (int64_t c = 0; c < h; ++c) {
      const double xhat = (At(x, r * h + c) - At(mean, r)) * At(rstd, r);
      const double g = At(dy, r * h + c) * At(gamma, c);
      At(result.dx, r * h + c) = At(rstd, r) * (g - average_g - xhat * average_gx);
      At(result.dgamma, c) += At(dy, r * h + c) * xhat;
      At(result.dbeta, c) += At(dy, r * h + c);
    }
  }
  return result;
}

NormGradients LayerNormBackwardFromOutput(const Vec& dy, const Vec& y, const Vec& beta,
                                          const Vec& gamma, const Vec& rstd, int64_t t, int64_t h) {
  NormGradients result{Zeros(t * h), Zeros(h), Zeros(h)};
  for (int64_t r = 0; r < t; ++r) {
    // With xhat = (y - beta) / gamma and g = dy * gamma:
    //   dx = rstd * (g - average(g) - xhat * average(g * xhat))
    double average_g = 0.0, average_gx = 0.0;
    for (int64_t c = 0; c < h; ++c) {
      const double xhat = (At(y, r * h + c) - At(beta, c)) / At(gamma, c);
      const double g = At(dy, r * h + c) * At(gamma, c);
      average_g += g / static_cast<double>(h);
      average_gx += g * xhat / static_cast<double>(h);
    }
    for (int64_t c = 0; c < h; ++c) {
      const double xhat = (At(y, r * h + c) - At(beta, c)) / At(gamma, c);
      const double g = At(dy, r * h + c) * At(gamma, c);
      At(result.dx, r * h + c) = At(rstd, r) * (g - average_g - xhat * average_gx);
      At(result.dgamma, c) += At(dy, r * h + c) * xhat;
      At(result.dbeta, c) += At(dy, r * h + c);
    }
  }
  return result;
}

Vec DropoutAdd(const Vec& x, const Vec& bias, const Vec& residual, const Mask& mask, int64_t t,
               int64_t h) {
  const Vec factors = DropoutFactors(mask, t, h);
  Vec sum = Zeros(t * h);
  for (int64_t r = 0; r < t; ++r)
    for (int64_t c = 0; c < h; ++c) {
      const int64_t i = r * h + c;
      At(sum, i) = At(residual, i) + At(factors, i) * (At(x, i) + At(bias, c));
    }
  return sum;
}

Vec DropoutAddBackward(const Vec& ds, const Mask& mask, int64_t t, int64_t h) {
  const Vec factors = DropoutFactors(mask, t, h);
  Vec dx = Zeros(t * h);
  for (int64_t i = 0; i < t * h; ++i) At(dx, i) = At(factors, i) * At(ds, i);
  return dx;
}

Sequence SequenceOf(const AttentionShape& s, const Keys& keys, int64_t sample) {
  if (keys.cu_seqlens.empty()) return {sample * s.seq, s.seq};
  const int64_t first = At(keys.cu_seqlens, sample);
  return {first, At(keys.cu_seqlens, sample + 1) - first};
}

int64_t Tokens(const AttentionShape& s, const Keys& keys) {
  return keys.cu_seqlens.empty() ? s.batch * s.seq : keys.cu_seqlens.back();
}

int64_t FirstDropoutRow(const AttentionShape& s, const Keys& keys, int64_t sample, int64_t head) {
  const Sequence sequence = SequenceOf(s, keys, sample);
  return sequence.first * s.heads + head * sequence.length;
}

namespace {

// Where row `token` of q (part 0), k (1) or v (2) of one head begins in qkv.
int64_t HeadRow(const AttentionShape& s, int64_t token, int part, int64_t head) {
  return token * 3 * s.hidden + part * s.hidden + head * (s.hidden / s.heads);
}

}  // namespace

Vec AttentionProbs(const AttentionShape& s, const Vec& qkv, const Keys& keys, int64_t sample,
                   int64_t head) {
  const int64_t d = s.hidden / s.heads;
  const auto [first, length] = SequenceOf(s, keys, sample);
  Vec probs = Zeros(length * length);
  for (int64_t i = 0; i < length; ++i) {
    Vec scores = Zeros(length);
    double largest = -std::numeric_limits<double>::infinity();
    for (int64_t j = 0; j < length; ++j) {
      double dot = 0.0;
      for (int64_t c = 0; c < d; ++c)
        dot += At(qkv, HeadRow(s, first + i, 0, head) + c) *
               At(qkv, HeadRow(s, first + j, 1, head) + c);
      At(scores, j) = dot * s.scale;
      if (!keys.mask.empty()) At(scores, j) += At(keys.mask, sample * s.seq + j);
      if (!keys.lengths.empty() && j >= At(keys.lengths, sample))
        At(scores, j) = -std::numeric_limits<double>::infinity();
      if (keys.causal && j > i) At(scores, j) = -std::numeric_limits<double>::infinity();
      largest = std::max(largest, At(scores, j));
    }
    if (std::isinf(largest)) continue;  // every key is masked out
    double sum = 0.0;
    for (int64_t j = 0; j < length; ++j) sum += std::exp(At(scores, j) - largest);
    for (int64_t j = 0; j < length; ++j)
      At(probs, i * length + j) = std::exp(At(scores, j) - largest) / sum;
  }
  return probs;
}

Vec Attention(const AttentionShape& s, const Vec& qkv, const Keys& keys, const Mask& mask) {
  const int64_t d = s.hidden / s.heads, t = Tokens(s, keys);
  const Vec factors = DropoutFactors(mask, t * s.heads, s.seq);
  Vec out = Zeros(t * s.hidden);
  for (int64_t b = 0; b < s.batch; ++b)
    for (int64_t a = 0; a < s.heads; ++a) {
      const auto [first, length] = SequenceOf(s, keys, b);
      const Vec probs = AttentionProbs(s, qkv, keys, b, a);
      for (int64_t i = 0; i < length; ++i) {
        const int64_t out_row = (first + i) * s.hidden + a * d;
        const int64_t factor_row = (FirstDropoutRow(s, keys, b, a) + i) * s.seq;
        for (int64_t j = 0; j < length; ++j) {
          const double dropped = At(factors, factor_row + j) * At(probs, i * length + j);
          for (int64_t c = 0; c < d; ++c)
            At(out, out_row + c) += dropped * At(qkv, HeadRow(s, first + j, 2, a) + c);
        }
      }
    }
  return out;
}

Vec AttentionBackward(const AttentionShape& s, const Vec& qkv, const Keys& keys, const Mask& mask,
                      const Vec& dout) {
  const int64_t d = s.hidden / s.heads, t = Tokens(s, keys);
  const Vec factors = DropoutFactors(mask, t * s.heads, s.seq);
  Vec dqkv = Zeros(t * 3 * s.hidden);
  for (int64_t b = 0; b < s.batch; ++b)
    for (int64_t a = 0; a < s.heads; ++a) {
      const auto [first, length] = SequenceOf(s, keys, b);
      const Vec probs = AttentionProbs(s, qkv, keys, b, a);
      for (int64_t i = 0; i < length; ++i) {
        const int64_t out_row = (first + i) * s.hidden + a * d;
        const int64_t factor_row = (FirstDropoutRow(s, keys, b, a) + i) * s.seq;
        const int64_t q_row = HeadRow(s, first + i, 0, a);
        // out = (factor * prob) v
        Vec dprobs = Zeros(length);
        for (int64_t j = 0; j < length; ++j) {
          const double factor = At(factors, factor_row + j);
          const double prob = At(probs, i * length + j);
          const int64_t v_row = HeadRow(s, first + j, 2, a);
          for (int64_t c = 0; c < d; ++c) {
            At(dprobs, j) += factor * At(dout, out_row + c) * At(qkv, v_row + c);
            At(dqkv, v_row + c) += factor * prob * At(dout, out_row + c);
          }
        }
        // prob = softmax(score): dscore = prob * (dprob - sum of prob * dprob)
        double sum = 0.0;
        for (int64_t j = 0; j < length; ++j) sum += At(probs, i * length + j) * At(dprobs, j);
        // score = scale * q k^T
        for (int64_t j = 0; j < length; ++j) {
          const double dscore = At(probs, i * length + j) * (At(dprobs, j) - sum);
          const int64_t k_row = HeadRow(s, first + j, 1, a);
          for (int64_t c = 0; c < d; ++c) {
            At(dqkv, q_row + c) += dscore * s.scale * At(qkv, k_row + c);
            At(dqkv, k_row + c) += dscore * s.scale * At(qkv, q_row + c);
          }
        }
      }
    }
  return dqkv;
}

Stats GradientStats(const Vec& grad, double loss_scale, double max_norm) {
  Stats stats;
  double squares = 0.0;
  for (double g : grad) {
    if (!std::isfinite(g)) stats.skip = true;
    squares += std::pow(g / loss_scale, 2);
  }
  stats.grad_norm = std::sqrt(squares);
  const double clip =
      max_norm > 0.0 && stats.grad_norm > max_norm ? max_norm / stats.grad_norm : 1.0;
  stats.grad_scale = clip / loss_scale;
  return stats;
}

void AdamW(const AdamWSettings& s, double grad_scale, const Vec& grad, Vec& master, Vec& m,
           Vec& v) {
  for (size_t i = 0; i < grad.size(); ++i) {
    const double g = grad[i] * grad_scale;
    m[i] = s.beta1 * m[i] + (1.0 - s.beta1) * g;
    v[i] = s.beta2 * v[i] + (1.0 - s.beta2) * g * g;
    const double step = (m[i] / s.correction1) / (std::sqrt(v[i] / s.correction2) + s.eps);
    master[i] -= s.lr * (s.weight_decay * master[i] + step);
  }
}

void Lamb(const LambSettings& s, const std::vector<LambSegment>& segments, double grad_scale,
          const Vec& grad, Vec& master, Vec& m, Vec& v) {
  const AdamWSettings& a = s.adam;
  for (const LambSegment& segment : segments) {
    Vec update = Zeros(segment.end - segment.begin);
    double weight_squares = 0.0, update_squares = 0.0;
    for (int64_t i = segment.begin; i < segment.end; ++i) {
      const double g = At(grad, i) * grad_scale;
      At(m, i) = a.beta1 * At(m, i) + (1.0 - a.beta1) * g;
      At(v, i) = a.beta2 * At(v, i) + (1.0 - a.beta2) * g * g;
      double& u = At(update, i - segment.begin);
      u = (At(m, i) / a.correction1) / (std::sqrt(At(v, i) / a.correction2) + a.eps);
      if (segment.decay != 0) u += a.weight_decay * At(master, i);
      weight_squares += std::pow(At(master, i), 2);
      update_squares += std::pow(u, 2);
    }
    double ratio = 1.0;
    if (segment.adapt != 0 && weight_squares > 0.0 && update_squares > 0.0) {
      ratio = std::sqrt(weight_squares) / std::sqrt(update_squares);
      ratio = std::max(ratio, s.min_ratio);
      if (s.max_ratio > 0.0) ratio = std::min(ratio, s.max_ratio);
    }
    for (int64_t i = segment.begin; i < segment.end; ++i)
      At(master, i) -= a.lr * ratio * At(update, i - segment.begin);
  }
}

}  // namespace lamina::ref
