// The oracle: every op of the op set and its gradient, as plain loops in double precision.
//
// Tests alone use it. It is written to be obvious, never to be fast: each function is its formula,
// and shares nothing with a backend but philox.h, because the masks are part of the definition.
// Letters and layouts are those of backend.h. Sizes are taken on trust.
#pragma once

#include <cstdint>
#include <vector>

#include "lamina/kernels/backend.h"
#include "lamina/kernels/philox.h"

namespace lamina::ref {

using Vec = std::vector<double>;

// --- dropout ---

struct Mask {
  float ratio = 0.0f;  // p in [0, 1)
  RngState rng{};
  uint32_t stream = 0;  // DropoutStream(layer, site)
};
// What each element of a matrix [rows, cols] is multiplied by: 0 where it is dropped, else one over
// the keep probability; 1 everywhere at p = 0.
Vec DropoutFactors(const Mask& mask, int64_t rows, int64_t cols);

// --- products ---

struct ProductShape {
  int64_t t = 0, k = 0, n = 0;
};
// y [T, N] = x w^T + bias; an empty bias is none.
Vec Linear(const ProductShape& s, const Vec& x, const Vec& w, const Vec& bias);
// dx [T, K] = dy w
Vec LinearInputGrad(const ProductShape& s, const Vec& dy, const Vec& w);
// dw [N, K] = dy^T x
Vec LinearWeightGrad(const ProductShape& s, const Vec& dy, const Vec& x);
// [cols]: sums of the columns of m [rows, cols]
Vec ColumnSums(const Vec& m, int64_t rows, int64_t cols);

// --- gelu ---

double Gelu(GeluKind kind, double x);
double GeluDerivative(GeluKind kind, double x);

// --- layer norm over rows of H ---

struct NormResult {
  Vec y, mean, rstd;  // [T, H], [T], [T]
};
NormResult LayerNorm(const Vec& x, const Vec& gamma, const Vec& beta, double eps, int64_t t,
                     int64_t h);

// y of the statistics that the forward left: what a norm's backward makes again.
Vec LayerNormOutput(const Vec& x, const Vec& gamma, const Vec& beta, const Vec& mean,
                    const Vec& rstd, int64_t t, int64_t h);

struct NormGradients {
  Vec dx, dgamma, dbeta;  // [T, H], [H], [H]
};
// mean and rstd are inputs like the others, as in backend.h; how they depend on x is in the
// formula.
NormGradients LayerNormBackward(const Vec& dy, const Vec& x, const Vec& gamma, const Vec& mean,
                                const Vec& rstd, int64_t t, int64_t h);
// The same from the norm's output, whose normalised values are (y - beta) / gamma.
NormGradients LayerNormBackwardFromOutput(const Vec& dy, const Vec& y, const Vec& beta,
                                          const Vec& gamma, const Vec& rstd, int64_t t, int64_t h);

// --- sum = residual + dropout(x + bias) ---

Vec DropoutAdd(const Vec& x, const Vec& bias, const Vec& residual, const Mask& mask, int64_t t,
               int64_t h);
// dx of it for a gradient ds of the sum; dbias is dx's column sums, dresidual is ds.
Vec DropoutAddBackward(const Vec& ds, const Mask& mask, int64_t t, int64_t h);

// --- attention ---

struct AttentionShape {
  int64_t batch = 0, seq = 0, hidden = 0, heads = 0;
  double scale = 1.0;
};
// Which keys a query may see. At most one of the three vectors; empty: absent.
struct Keys {
  Vec mask;                         // [B, S], added to the scores; -inf masks out
  std::vector<int32_t> lengths;     // [B]
  std::vector<int32_t> cu_seqlens;  // [B + 1]: the batch is packed
  bool causal = false;              // a query sees none after itself
};
// The tokens of sample b: S each, or as cu_seqlens has them.
struct Sequence {
  int64_t first = 0, length = 0;
};
Sequence SequenceOf(const AttentionShape& s, const Keys& keys, int64_t sample);
// T
int64_t Tokens(const AttentionShape& s, const Keys& keys);
// The first of a head's `length` rows of the dropout factors [A * T, S].
int64_t FirstDropoutRow(const AttentionShape& s, const Keys& keys, int64_t sample, int64_t head);
// softmax(q k^T * scale + mask) of one head of one sample, before dropout: [length, length]. A row
// whose keys are all masked out is zero.
Vec AttentionProbs(const AttentionShape& s, const Vec& qkv, const Keys& keys, int64_t sample,
                   int64_t head);
// out [T, H] of qkv [T, 3H]
Vec Attention(const AttentionShape& s, const Vec& qkv, const Keys& keys, const Mask& mask);
// dqkv [T, 3H] for dout [T, H]
Vec AttentionBackward(const AttentionShape& s, const Vec& qkv, const Keys& keys, const Mask& mask,
                      const Vec& dout);

// --- optimizer ---

struct Stats {
  double grad_norm = 0;   // L2 norm of grad / loss_scale
  double grad_scale = 0;  // clip / loss_scale
  bool skip = false;      // a gradient was not finite
};
// max_norm 0: no clipping.
Stats GradientStats(const Vec& grad, double loss_scale, double max_norm);

struct AdamWSettings {
  double lr = 0, beta1 = 0, beta2 = 0, eps = 0, weight_decay = 0;
  double correction1 = 1, correction2 = 1;  // 1 - beta^t
};
// One step on master, m and v in place.
void AdamW(const AdamWSettings& s, double grad_scale, const Vec& grad, Vec& master, Vec& m, Vec& v);

struct LambSettings {
  AdamWSettings adam;                   // its lr, betas, eps, weight_decay and corrections
  double min_ratio = 0, max_ratio = 0;  // max 0: no clamp above
};
// One step on the segments of master, m and v, in place.
void Lamb(const LambSettings& s, const std::vector<LambSegment>& segments, double grad_scale,
          const Vec& grad, Vec& master, Vec& m, Vec& v);

}  // namespace lamina::ref
