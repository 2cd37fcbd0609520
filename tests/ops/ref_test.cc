// The oracle against values from outside it, and each gradient against central differences of its
// forward in fp64.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "gradient_check.h"
#include "ref/ops.h"
#include "support/rounding.h"

namespace lamina {
namespace {

using ref::Vec;
using testing::Dot;
using testing::ExpectGradient;

constexpr double kInf = std::numeric_limits<double>::infinity();

Vec Values(uint64_t seed, int64_t count, double spread = 1.0, double offset = 0.0) {
  return testing::Noise(DType::kF32, seed, count, spread, offset);
}

// --- values from outside ---

TEST(Ref, LinearByHand) {
  const ref::ProductShape s{.t = 2, .k = 3, .n = 2};
  const Vec x = {1, 2, 3, -1, 0, 4}, w = {1, 0, -1, 2, 1, 0.5};
  EXPECT_EQ(ref::Linear(s, x, w, {10, 20}), (Vec{8, 25.5, 5, 20}));
  EXPECT_EQ(ref::Linear(s, x, w, {}), (Vec{-2, 5.5, -5, 0}));
}

TEST(Ref, GeluKnownValues) {
  // x * Phi(x) with Phi(1) = 0.8413447460685429, and PyTorch's gelu(approximate='tanh').
  EXPECT_NEAR(ref::Gelu(GeluKind::kErf, 1.0), 0.8413447460685429, 1e-15);
  EXPECT_NEAR(ref::Gelu(GeluKind::kErf, -1.0), -0.15865525393145707, 1e-15);
  EXPECT_NEAR(ref::Gelu(GeluKind::kTanh, 1.0), 0.8411919906082768, 1e-15);
  EXPECT_NEAR(ref::Gelu(GeluKind::kTanh, -2.0), -0.04540230591222498, 1e-15);
  for (GeluKind kind : {GeluKind::kErf, GeluKind::kTanh}) {
    EXPECT_EQ(ref::Gelu(kind, 0.0), 0.0);
    EXPECT_EQ(ref::Gelu(kind, 40.0), 40.0);
    EXPECT_EQ(ref::GeluDerivative(kind, 40.0), 1.0);
    EXPECT_EQ(ref::GeluDerivative(kind, 0.0), 0.5);
  }
}

TEST(Ref, LayerNormByHand) {
  const ref::NormResult r = ref::LayerNorm({1, 3, 5, 7}, {1, 1, 2, 1}, {0, 0, 0, 10}, 0.0, 1, 4);
  EXPECT_DOUBLE_EQ(r.mean[0], 4.0);
  EXPECT_DOUBLE_EQ(r.rstd[0], 1.0 / std::sqrt(5.0));
  EXPECT_NEAR(r.y[0], -3.0 / std::sqrt(5.0), 1e-15);
  EXPECT_NEAR(r.y[2], 2.0 / std::sqrt(5.0), 1e-15);
  EXPECT_NEAR(r.y[3], 10.0 + 3.0 / std::sqrt(5.0), 1e-15);
  // Of other statistics than the row's, as they are.
  EXPECT_EQ(ref::LayerNormOutput({1, 3, 5, 7}, {1, 2}, {0, 10}, {1, 4}, {2, 0.5}, 2, 2),
            (Vec{0, 18, 0.5, 13}));
}

TEST(Ref, AttentionByHand) {
  // One head, D 1, S 2: q = (1, 0), k = (0, ln 3), v = (10, 20), scale 1.
  const ref::AttentionShape s{.batch = 1, .seq = 2, .hidden = 1, .heads = 1, .scale = 1.0};
  const Vec qkv = {1, 0, 10, 0, std::log(3.0), 20};
  const Vec out = ref::Attention(s, qkv, {}, {});
  EXPECT_NEAR(out[0], 0.25 * 10 + 0.75 * 20, 1e-14);
  EXPECT_NEAR(out[1], 15.0, 1e-14);
  EXPECT_EQ(ref::Attention(s, qkv, {.lengths = {1}}, {}), (Vec{10, 10}));
  EXPECT_EQ(ref::Attention(s, qkv, {.mask = {-kInf, 0}}, {}), (Vec{20, 20}));
  EXPECT_EQ(ref::Attention(s, qkv, {.mask = {-kInf, -kInf}}, {}), (Vec{0, 0}));
  EXPECT_NEAR(ref::Attention(s, qkv, {.mask = {std::log(2.0), 0}}, {})[1], 40.0 / 3, 1e-14);
}

// As above with three tokens more: two sequences of two tokens and one of one.
TEST(Ref, CausalAndPackedAttentionByHand) {
  const ref::AttentionShape s{.batch = 3, .seq = 2, .hidden = 1, .heads = 1, .scale = 1.0};
  const Vec qkv = {1, 0, 10, 0, std::log(3.0), 20, 7, 7, 5, 1, 0, 10, 1, std::log(3.0), 20};
  const ref::Keys packed{.cu_seqlens = {0, 2, 3, 5}};
  const Vec out = ref::Attention(s, qkv, packed, {});
  EXPECT_NEAR(out[0], 17.5, 1e-14);
  EXPECT_NEAR(out[1], 15.0, 1e-14);
  EXPECT_EQ(out[2], 5.0);
  EXPECT_NEAR(out[3], 17.5, 1e-14);
  EXPECT_NEAR(out[4], 17.5, 1e-14);
  const Vec causal = ref::Attention(s, qkv, {.cu_seqlens = {0, 2, 3, 5}, .causal = true}, {});
  EXPECT_EQ(causal[0], 10.0);
  EXPECT_NEAR(causal[1], 15.0, 1e-14);
  EXPECT_EQ(causal[2], 5.0);
  EXPECT_EQ(causal[3], 10.0);
  EXPECT_NEAR(causal[4], 17.5, 1e-14);
  // What causal hides, a mask may hide besides.
  const ref::AttentionShape two{.batch = 1, .seq = 2, .hidden = 1, .heads = 1, .scale = 1.0};
  EXPECT_EQ(ref::Attention(two, {1, 0, 10, 0, 0, 20}, {.mask = {-kInf, 0}, .causal = true}, {}),
            (Vec{0, 20}));
}

// A packed batch of equal lengths is the batch itself, masks included.
TEST(Ref, PackedEqualLengthsAreDense) {
  const ref::AttentionShape s{.batch = 3, .seq = 4, .hidden = 6, .heads = 2, .scale = 0.6};
  const ref::Mask mask{0.4f, RngState{5, 6}, DropoutStream(2, DropoutSite::kAttentionProbs)};
  const Vec qkv = Values(61, 12 * 18), dout = Values(62, 12 * 6);
  for (const bool causal : {false, true}) {
    const ref::Keys dense{.causal = causal};
    const ref::Keys packed{.cu_seqlens = {0, 4, 8, 12}, .causal = causal};
    EXPECT_EQ(ref::Attention(s, qkv, packed, mask), ref::Attention(s, qkv, dense, mask));
    EXPECT_EQ(ref::AttentionBackward(s, qkv, packed, mask, dout),
              ref::AttentionBackward(s, qkv, dense, mask, dout));
  }
}

TEST(Ref, AdamWByHand) {
  // The first step of a single weight: m/c1 = g and sqrt(v/c2) = |g|, so the step is lr * sign(g).
  Vec master = {2.0}, m = {0.0}, v = {0.0};
  const ref::AdamWSettings s{.lr = 0.1,
                             .beta1 = 0.9,
                             .beta2 = 0.99,
                             .eps = 0.0,
                             .weight_decay = 0.5,
                             .correction1 = 0.1,
                             .correction2 = 0.01};
  ref::AdamW(s, 0.25, {-8.0}, master, m, v);
  EXPECT_NEAR(m[0], -0.2, 1e-15);
  EXPECT_NEAR(v[0], 0.04, 1e-15);
  EXPECT_NEAR(master[0], 2.0 - 0.1 * (0.5 * 2.0 - 1.0), 1e-15);
}

TEST(Ref, LambByHand) {
  // As above; ||w|| = 5, and each update is sign(g) + weight_decay * w.
  const ref::AdamWSettings adam{.lr = 0.1,
                                .beta1 = 0.9,
                                .beta2 = 0.99,
                                .eps = 0.0,
                                .weight_decay = 0.5,
                                .correction1 = 0.1,
                                .correction2 = 0.01};
  struct Variant {
    const char* name;
    double min_ratio, max_ratio;
    LambSegment segment;
    double step0, step1;  // of the weights 3 and 4, whose gradients are 2 and -2
  };
  const double ratio = 5.0 / std::sqrt(2.5 * 2.5 + 1.0);
  for (const Variant& v :
       {Variant{"plain", 0, 0, {1, 3, 1, 1}, 2.5 * ratio, 1.0 * ratio},
        Variant{"clamped above", 0, 1.25, {1, 3, 1, 1}, 3.125, 1.25},
        Variant{"clamped below", 4, 0, {1, 3, 1, 1}, 10.0, 4.0},
        Variant{"no decay", 0, 0, {1, 3, 0, 1}, 5 / std::sqrt(2.0), -5 / std::sqrt(2.0)},
        Variant{"no trust ratio", 4, 5, {1, 3, 1, 0}, 2.5, 1.0}}) {
    SCOPED_TRACE(v.name);
    Vec master = {9, 3, 4, 9}, m(4, 0.0), second(4, 0.0);
    ref::Lamb({adam, v.min_ratio, v.max_ratio}, {v.segment}, 0.5, {8, 4, -4, 8}, master, m, second);
    EXPECT_EQ(master[0], 9);
    EXPECT_NEAR(master[1], 3 - 0.1 * v.step0, 1e-14);
    EXPECT_NEAR(master[2], 4 - 0.1 * v.step1, 1e-14);
    EXPECT_EQ(master[3], 9);
    EXPECT_EQ(m[0], 0);
    EXPECT_NEAR(m[1], 0.2, 1e-15);
    EXPECT_NEAR(second[2], 0.04, 1e-15);
  }
  // Weights of zero, and an update of zero: the ratio is 1 whatever the clamps.
  Vec zero = {0, 0}, ones = {1, 1}, m(2, 0.0), v(2, 0.0);
  ref::Lamb({adam, 3, 4}, {{0, 2, 1, 1}}, 1.0, {2, -2}, zero, m, v);
  EXPECT_NEAR(zero[0], -0.1, 1e-15);
  ref::AdamWSettings free = adam;
  free.weight_decay = 0;
  free.eps = 1;
  m = v = {0, 0};
  ref::Lamb({free, 3, 4}, {{0, 2, 1, 1}}, 1.0, {0, 0}, ones, m, v);
  EXPECT_EQ(ones, (Vec{1, 1}));
}

TEST(Ref, GradientStatsByHand) {
  const ref::Stats free = ref::GradientStats({3, -4}, 2.0, 0.0);
  EXPECT_DOUBLE_EQ(free.grad_norm, 2.5);
  EXPECT_DOUBLE_EQ(free.grad_scale, 0.5);
  EXPECT_FALSE(free.skip);
  EXPECT_DOUBLE_EQ(ref::GradientStats({3, -4}, 2.0, 0.5).grad_scale, 0.5 * 0.2);
  EXPECT_DOUBLE_EQ(ref::GradientStats({3, -4}, 2.0, 5.0).grad_scale, 0.5);
  EXPECT_TRUE(ref::GradientStats({3, kInf}, 1.0, 0.0).skip);
  EXPECT_TRUE(ref::GradientStats({std::nan(""), 1}, 1.0, 0.0).skip);
}

// --- gradients ---

TEST(RefGradient, Linear) {
  const ref::ProductShape s{.t = 3, .k = 5, .n = 4};
  Vec x = Values(1, s.t * s.k), w = Values(2, s.n * s.k), bias = Values(3, s.n);
  const Vec dy = Values(4, s.t * s.n);
  const auto loss = [&] { return Dot(ref::Linear(s, x, w, bias), dy); };
  ExpectGradient("dx", loss, x, ref::LinearInputGrad(s, dy, w));
  ExpectGradient("dw", loss, w, ref::LinearWeightGrad(s, dy, x));
  ExpectGradient("dbias", loss, bias, ref::ColumnSums(dy, s.t, s.n));
}

TEST(RefGradient, Gelu) {
  for (GeluKind kind : {GeluKind::kErf, GeluKind::kTanh}) {
    Vec x = Values(5, 64, 6.0);
    const Vec dy = Values(6, 64);
    const auto loss = [&] {
      double sum = 0;
      for (size_t i = 0; i < x.size(); ++i) sum += dy[i] * ref::Gelu(kind, x[i]);
      return sum;
    };
    Vec dx(x.size());
    for (size_t i = 0; i < x.size(); ++i) dx[i] = dy[i] * ref::GeluDerivative(kind, x[i]);
    ExpectGradient("dx", loss, x, dx);
  }
}

TEST(RefGradient, LayerNorm) {
  const int64_t t = 4, h = 7;
  Vec x = Values(7, t * h, 1.0, 0.5), gamma = Values(8, h, 1.0, 1.0), beta = Values(9, h);
  const Vec dy = Values(10, t * h);
  const auto loss = [&] { return Dot(ref::LayerNorm(x, gamma, beta, 1e-5, t, h).y, dy); };
  const ref::NormResult n = ref::LayerNorm(x, gamma, beta, 1e-5, t, h);
  const ref::NormGradients g = ref::LayerNormBackward(dy, x, gamma, n.mean, n.rstd, t, h);
  ExpectGradient("dx", loss, x, g.dx);
  ExpectGradient("dgamma", loss, gamma, g.dgamma);
  ExpectGradient("dbeta", loss, beta, g.dbeta);
}

// Recovered from the output, the normalised values are what they are from the input.
TEST(RefGradient, LayerNormFromOutput) {
  const int64_t t = 4, h = 7;
  Vec x = Values(7, t * h, 1.0, 0.5), gamma = Values(8, h, 0.5, -1.0), beta = Values(9, h);
  const Vec dy = Values(10, t * h);
  const auto loss = [&] { return Dot(ref::LayerNorm(x, gamma, beta, 1e-5, t, h).y, dy); };
  const ref::NormResult n = ref::LayerNorm(x, gamma, beta, 1e-5, t, h);
  const ref::NormGradients g = ref::LayerNormBackwardFromOutput(dy, n.y, beta, gamma, n.rstd, t, h);
  ExpectGradient("dx", loss, x, g.dx);
  ExpectGradient("dgamma", loss, gamma, g.dgamma);
  ExpectGradient("dbeta", loss, beta, g.dbeta);
}

TEST(RefGradient, DropoutAdd) {
  const int64_t t = 4, h = 11;
  for (float ratio : {0.0f, 0.1f, 0.5f}) {
    const ref::Mask mask{ratio, RngState{3, 4}, DropoutStream(1, DropoutSite::kFeedForward)};
    Vec x = Values(11, t * h), bias = Values(12, h), residual = Values(13, t * h);
    const Vec ds = Values(14, t * h);
    const auto loss = [&] { return Dot(ref::DropoutAdd(x, bias, residual, mask, t, h), ds); };
    const Vec dx = ref::DropoutAddBackward(ds, mask, t, h);
    ExpectGradient("dx", loss, x, dx);
    ExpectGradient("dbias", loss, bias, ref::ColumnSums(dx, t, h));
    ExpectGradient("dresidual", loss, residual, ds);
  }
}

// The whole of DropoutAddNorm, whose sum is used twice.
TEST(RefGradient, DropoutAddNorm) {
  const int64_t t = 3, h = 9;
  const ref::Mask mask{0.3f, RngState{3, 4}, DropoutStream(1, DropoutSite::kAttentionOutput)};
  Vec x = Values(15, t * h), bias = Values(16, h), residual = Values(17, t * h);
  const Vec gamma = Values(18, h, 1.0, 1.0), beta = Values(19, h);
  const Vec dy = Values(20, t * h), dsum = Values(21, t * h);
  const auto loss = [&] {
    const Vec sum = ref::DropoutAdd(x, bias, residual, mask, t, h);
    return Dot(sum, dsum) + Dot(ref::LayerNorm(sum, gamma, beta, 1e-5, t, h).y, dy);
  };
  const Vec sum = ref::DropoutAdd(x, bias, residual, mask, t, h);
  const ref::NormResult n = ref::LayerNorm(sum, gamma, beta, 1e-5, t, h);
  Vec ds = ref::LayerNormBackward(dy, sum, gamma, n.mean, n.rstd, t, h).dx;
  for (size_t i = 0; i < ds.size(); ++i) ds[i] += dsum[i];
  const Vec dx = ref::DropoutAddBackward(ds, mask, t, h);
  ExpectGradient("dx", loss, x, dx);
  ExpectGradient("dbias", loss, bias, ref::ColumnSums(dx, t, h));
  ExpectGradient("dresidual", loss, residual, ds);
}

TEST(RefGradient, Attention) {
  const ref::AttentionShape s{.batch = 2, .seq = 5, .hidden = 6, .heads = 2, .scale = 0.6};
  std::vector<ref::Keys> all_keys(5);
  all_keys[1].lengths = {5, 2};
  all_keys[2].mask = Values(22, 10);
  all_keys[2].mask[1] = -kInf;
  all_keys[3].mask = Vec(10, 0.0);  // the second sample: every key masked out
  for (size_t i = 5; i < 10; ++i) all_keys[3].mask[i] = -kInf;
  all_keys[4].cu_seqlens = {0, 5, 7};  // packed
  for (ref::Keys& keys : all_keys)
    for (bool causal : {false, true})
      for (float ratio : {0.0f, 0.4f}) {
        keys.causal = causal;
        const ref::Mask mask{ratio, RngState{5, 6}, DropoutStream(2, DropoutSite::kAttentionProbs)};
        const int64_t t = ref::Tokens(s, keys);
        Vec qkv = Values(23, t * 18);
        const Vec dout = Values(24, t * 6);
        const auto loss = [&] { return Dot(ref::Attention(s, qkv, keys, mask), dout); };
        ExpectGradient("dqkv", loss, qkv, ref::AttentionBackward(s, qkv, keys, mask, dout));
      }
}

}  // namespace
}  // namespace lamina
