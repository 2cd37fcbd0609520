#include "ref/layer.h"

#include <cmath>
#include <cstddef>

namespace lamina::ref {
namespace {

struct Shapes {
  Shapes(const LayerConfig& c, const Keys& keys)
      : attention{c.batch, c.seq, c.hidden, c.heads,
                  1.0 / std::sqrt(static_cast<double>(c.hidden / c.heads))},
        t(Tokens(attention, keys)),
        h(c.hidden),
        qkv{t, h, 3 * h},
        o{t, h, h},
        inter{t, h, c.intermediate},
        output{t, c.intermediate, h} {}
  AttentionShape attention;
  int64_t t, h;
  ProductShape qkv, o, inter, output;
};

Mask MaskOf(const LayerConfig& c, DropoutSite site) {
  const float ratio =
      site == DropoutSite::kAttentionProbs ? c.attn_dropout_ratio : c.hidden_dropout_ratio;
  return Mask{ratio, c.rng, DropoutStream(c.layer_index, site)};
}

void Add(Vec& to, const Vec& what) {
  for (size_t i = 0; i < to.size(); ++i) to[i] += what[i];
}

}  // namespace

LayerValues LayerForward(const LayerConfig& config, const LayerParameters& p, const Vec& x,
                         const Keys& keys) {
  const Shapes s(config, keys);
  LayerValues v;
  v.x = x;
  if (config.pre_layer_norm) v.norm = LayerNorm(x, p.norm_w, p.norm_b, config.eps, s.t, s.h);
  v.n = config.pre_layer_norm ? v.norm.y : x;

  v.qkv = Linear(s.qkv, v.n, p.qkv_w, p.qkv_b);
  v.attention = Attention(s.attention, v.qkv, keys, MaskOf(config, DropoutSite::kAttentionProbs));
  v.attn_sum = DropoutAdd(Linear(s.o, v.attention, p.o_w, {}), p.o_b, x,
                          MaskOf(config, DropoutSite::kAttentionOutput), s.t, s.h);
  v.attn_norm = LayerNorm(v.attn_sum, p.attn_norm_w, p.attn_norm_b, config.eps, s.t, s.h);

  v.inter_pre = Linear(s.inter, v.attn_norm.y, p.inter_w, p.inter_b);
  v.inter = v.inter_pre;
  for (double& e : v.inter) e = Gelu(config.gelu, e);
  const Vec& residual = config.pre_layer_norm ? v.attn_sum : v.attn_norm.y;
  v.output_sum = DropoutAdd(Linear(s.output, v.inter, p.output_w, {}), p.output_b, residual,
                            MaskOf(config, DropoutSite::kFeedForward), s.t, s.h);
  if (!config.pre_layer_norm)
    v.norm = LayerNorm(v.output_sum, p.norm_w, p.norm_b, config.eps, s.t, s.h);
  v.y = config.pre_layer_norm ? v.output_sum : v.norm.y;
  return v;
}

LayerGradients LayerBackward(const LayerConfig& config, const LayerParameters& p,
                             const LayerValues& v, const Keys& keys, const Vec& dy) {
  const Shapes s(config, keys);
  LayerGradients g;
  LayerParameters& d = g.parameters;

  Vec doutput_sum = dy;
  if (!config.pre_layer_norm) {
    NormGradients norm =
        LayerNormBackward(dy, v.output_sum, p.norm_w, v.norm.mean, v.norm.rstd, s.t, s.h);
    doutput_sum = norm.dx;
    d.norm_w = norm.dgamma;
    d.norm_b = norm.dbeta;
  }

  const Vec doutput =
      DropoutAddBackward(doutput_sum, MaskOf(config, DropoutSite::kFeedForward), s.t, s.h);
  d.output_w = LinearWeightGrad(s.output, doutput, v.inter);
  d.output_b = ColumnSums(doutput, s.t, s.h);
  Vec dinter = LinearInputGrad(s.output, doutput, p.output_w);
  for (size_t i = 0; i < dinter.size(); ++i)
    dinter[i] *= GeluDerivative(config.gelu, v.inter_pre[i]);
  d.inter_w = LinearWeightGrad(s.inter, dinter, v.attn_norm.y);
  d.inter_b = ColumnSums(dinter, s.t, config.intermediate);
  Vec dffn_in = LinearInputGrad(s.inter, dinter, p.inter_w);
  if (!config.pre_layer_norm) Add(dffn_in, doutput_sum);  // the residual is the norm's output

  const NormGradients attn_norm = LayerNormBackward(dffn_in, v.attn_sum, p.attn_norm_w,
                                                    v.attn_norm.mean, v.attn_norm.rstd, s.t, s.h);
  d.attn_norm_w = attn_norm.dgamma;
  d.attn_norm_b = attn_norm.dbeta;
  Vec dattn_sum = attn_norm.dx;
  if (config.pre_layer_norm) Add(dattn_sum, doutput_sum);  // the residual is the sum itself

  const Vec do_product =
      DropoutAddBackward(dattn_sum, MaskOf(config, DropoutSite::kAttentionOutput), s.t, s.h);
  d.o_w = LinearWeightGrad(s.o, do_product, v.attention);
  d.o_b = ColumnSums(do_product, s.t, s.h);
  const Vec dattention = LinearInputGrad(s.o, do_product, p.o_w);
  const Vec dqkv = AttentionBackward(s.attention, v.qkv, keys,
                                     MaskOf(config, DropoutSite::kAttentionProbs), dattention);
  d.qkv_w = LinearWeightGrad(s.qkv, dqkv, v.n);
  d.qkv_b = ColumnSums(dqkv, s.t, 3 * s.h);
  g.dx = LinearInputGrad(s.qkv, dqkv, p.qkv_w);
  if (config.pre_layer_norm) {
    NormGradients norm = LayerNormBackward(g.dx, v.x, p.norm_w, v.norm.mean, v.norm.rstd, s.t, s.h);
    g.dx = norm.dx;
    d.norm_w = norm.dgamma;
    d.norm_b = norm.dbeta;
  }
  Add(g.dx, dattn_sum);
  return g;
}

}  // namespace lamina::ref
