// The oracle's whole layer: against PyTorch's values, and its gradients against central
// differences.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "gradient_check.h"
#include "ref/layer.h"

namespace lamina {
namespace {

using ref::LayerConfig;
using ref::LayerParameters;
using ref::Vec;

// Element i is offset + scale * sin(1.7 i + k): the same in any language.
Vec Fill(int64_t count, double k, double scale, double offset = 0.0) {
  Vec values(static_cast<size_t>(count));
  for (size_t i = 0; i < values.size(); ++i)
    values[i] = offset + scale * std::sin(1.7 * static_cast<double>(i) + k);
  return values;
}

LayerConfig Config(bool pre_layer_norm, GeluKind gelu) {
  return LayerConfig{.batch = 2,
                     .seq = 3,
                     .hidden = 4,
                     .heads = 2,
                     .intermediate = 6,
                     .pre_layer_norm = pre_layer_norm,
                     .eps = 1e-5,
                     .gelu = gelu};
}

LayerParameters Parameters(const LayerConfig& c) {
  const int64_t h = c.hidden, i = c.intermediate;
  return LayerParameters{.qkv_w = Fill(3 * h * h, 1, 0.5),
                         .qkv_b = Fill(3 * h, 2, 0.1),
                         .o_w = Fill(h * h, 3, 0.5),
                         .o_b = Fill(h, 4, 0.1),
                         .attn_norm_w = Fill(h, 5, 0.2, 1.0),
                         .attn_norm_b = Fill(h, 6, 0.1),
                         .inter_w = Fill(i * h, 7, 0.5),
                         .inter_b = Fill(i, 8, 0.1),
                         .output_w = Fill(h * i, 9, 0.5),
                         .output_b = Fill(h, 10, 0.1),
                         .norm_w = Fill(h, 11, 0.2, 1.0),
                         .norm_b = Fill(h, 12, 0.1)};
}

struct Named {
  const char* name;
  Vec LayerParameters::*member;
};
constexpr Named kNames[] = {{"qkv_w", &LayerParameters::qkv_w},
                            {"qkv_b", &LayerParameters::qkv_b},
                            {"o_w", &LayerParameters::o_w},
                            {"o_b", &LayerParameters::o_b},
                            {"attn_norm_w", &LayerParameters::attn_norm_w},
                            {"attn_norm_b", &LayerParameters::attn_norm_b},
                            {"inter_w", &LayerParameters::inter_w},
                            {"inter_b", &LayerParameters::inter_b},
                            {"output_w", &LayerParameters::output_w},
                            {"output_b", &LayerParameters::output_b},
                            {"norm_w", &LayerParameters::norm_w},
                            {"norm_b", &LayerParameters::norm_b}};

double SumAbs(const Vec& v) {
  double sum = 0;
  for (double e : v) sum += std::abs(e);
  return sum;
}

// Of each tensor its first element and the sum of its absolute values, from PyTorch in fp64 with
// torch.nn.functional's layer_norm, softmax and gelu, and its autograd; the tensors are made by
// Fill.
struct Expected {
  bool pre_layer_norm;
  GeluKind gelu;
  double y7, sum_y;
  std::pair<double, double> dx;
  std::pair<double, double> gradients[12];  // in kNames' order
};
const Expected kExpected[] = {
    {true,
     GeluKind::kErf,
     0.7251380922328365,
     19.558657785913358,
     {0.2584446738789984, 15.328813817963157},
     {{-0.03284907424242273, 15.169391243619973},
      {-0.045612629164937336, 7.863976550507402},
      {3.1866739452919215, 42.09554445981104},
      {-2.6069265276806144, 11.744010237357976},
      {-0.37291001802974716, 0.9439883757236563},
      {-0.6576532023639143, 1.5923837850214242},
      {-0.15427268104202915, 36.7436965132322},
      {0.21292117031693975, 8.264866467587284},
      {0.6618965328356354, 44.14903542389567},
      {-2.1574317261760525, 10.242235244836397},
      {0.0571360676465022, 0.26274323007942646},
      {-0.0725245812349598, 0.2507659219667778}}},
    {false,
     GeluKind::kTanh,
     -0.2811356614273812,
     20.751837498792476,
     {0.3404975653249869, 18.42433810709801},
     {{-0.05348324148967396, 16.229000144212726},
      {-0.0780269623412279, 8.185334519047416},
      {2.101782704588871, 39.21511294750252},
      {-1.4357631492355605, 13.019602922013881},
      {-0.4691648691346196, 1.8459822927640004},
      {-1.368101934853163, 8.599118426992787},
      {0.5831722100590052, 29.11796520411469},
      {0.9313077350824925, 7.660811180138259},
      {1.0425573018675958, 39.77335366601757},
      {-1.1109748341922163, 8.58749182236825},
      {-1.3914562816036524, 7.253230975278257},
      {-2.157431726176053, 10.242235244836397}}},
};

TEST(RefLayer, AgreesWithPyTorch) {
  for (const Expected& e : kExpected) {
    SCOPED_TRACE(e.pre_layer_norm ? "Pre-LN, erf" : "Post-LN, tanh");
    const LayerConfig c = Config(e.pre_layer_norm, e.gelu);
    const LayerParameters p = Parameters(c);
    const ref::Keys keys{.mask = Fill(6, 14, 1.0)};
    const ref::LayerValues values = LayerForward(c, p, Fill(24, 13, 1.0), keys);
    EXPECT_NEAR(values.y[7], e.y7, 1e-12);
    EXPECT_NEAR(SumAbs(values.y), e.sum_y, 1e-12);
    const ref::LayerGradients g = LayerBackward(c, p, values, keys, Fill(24, 15, 1.0));
    EXPECT_NEAR(g.dx[0], e.dx.first, 1e-12);
    EXPECT_NEAR(SumAbs(g.dx), e.dx.second, 1e-12);
    for (size_t i = 0; i < std::size(kNames); ++i) {
      const Vec& gradient = g.parameters.*kNames[i].member;
      EXPECT_NEAR(gradient[0], e.gradients[i].first, 1e-12) << kNames[i].name;
      EXPECT_NEAR(SumAbs(gradient), e.gradients[i].second, 1e-11) << kNames[i].name;
    }
  }
}

void CheckGradients(LayerConfig c, const ref::Keys& keys) {
  c.attn_dropout_ratio = 0.2f;
  c.hidden_dropout_ratio = 0.3f;
  c.rng = RngState{99, 7};
  c.layer_index = 5;
  LayerParameters p = Parameters(c);
  const int64_t tokens = keys.cu_seqlens.empty() ? c.batch * c.seq : keys.cu_seqlens.back();
  Vec x = Fill(tokens * c.hidden, 13, 1.0);
  const Vec dy = Fill(tokens * c.hidden, 15, 1.0);
  const auto loss = [&] { return testing::Dot(LayerForward(c, p, x, keys).y, dy); };
  const ref::LayerGradients g = LayerBackward(c, p, LayerForward(c, p, x, keys), keys, dy);
  testing::ExpectGradient("dx", loss, x, g.dx);
  for (const Named& named : kNames)
    testing::ExpectGradient(named.name, loss, p.*named.member, g.parameters.*named.member);
}

TEST(RefLayer, GradientsWithDropout) {
  for (bool pre : {true, false})
    for (GeluKind gelu : {GeluKind::kErf, GeluKind::kTanh}) {
      SCOPED_TRACE((pre ? "Pre-LN " : "Post-LN ") + std::to_string(static_cast<int>(gelu)));
      CheckGradients(Config(pre, gelu), {});
      CheckGradients(Config(pre, gelu), {.lengths = {3, 1}});
      Vec mask = Fill(6, 14, 1.0);
      for (size_t i = 3; i < 6; ++i) mask[i] = -std::numeric_limits<double>::infinity();
      CheckGradients(Config(pre, gelu), {.mask = mask});
    }
}

TEST(RefLayer, GradientsOfCausalAndPackedBatches) {
  for (bool pre : {true, false}) {
    SCOPED_TRACE(pre ? "Pre-LN" : "Post-LN");
    const LayerConfig c = Config(pre, GeluKind::kErf);
    CheckGradients(c, {.causal = true});
    CheckGradients(c, {.lengths = {3, 1}, .causal = true});
    CheckGradients(c, {.cu_seqlens = {0, 3, 5}});
    CheckGradients(c, {.cu_seqlens = {0, 2, 5}, .causal = true});
  }
}

// What a token's causal output depends on: itself and what comes before it.
TEST(RefLayer, CausalLooksBackAlone) {
  const LayerConfig c = Config(true, GeluKind::kErf);
  const LayerParameters p = Parameters(c);
  Vec x = Fill(24, 13, 1.0);
  const ref::Keys keys{.causal = true};
  const Vec y = LayerForward(c, p, x, keys).y;
  x[8] += 1.0;  // the first sample's third token
  const Vec other = LayerForward(c, p, x, keys).y;
  for (size_t i = 0; i < y.size(); ++i)
    if (i / 4 == 2)
      EXPECT_NE(other[i], y[i]) << i;
    else
      EXPECT_EQ(other[i], y[i]) << i;
}

// Two layers of a stack draw different masks, and so do two steps.
TEST(RefLayer, MasksFollowLayerAndCounter) {
  LayerConfig c = Config(true, GeluKind::kErf);
  c.hidden_dropout_ratio = 0.5f;
  c.rng = RngState{99, 7};
  const LayerParameters p = Parameters(c);
  const Vec x = Fill(24, 13, 1.0);
  const Vec y = LayerForward(c, p, x, {}).y;
  EXPECT_EQ(LayerForward(c, p, x, {}).y, y);
  LayerConfig other = c;
  other.layer_index = 1;
  EXPECT_NE(LayerForward(other, p, x, {}).y, y);
  other = c;
  other.rng.counter = 8;
  EXPECT_NE(LayerForward(other, p, x, {}).y, y);
}

}  // namespace
}  // namespace lamina
