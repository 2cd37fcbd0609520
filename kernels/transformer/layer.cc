#include "layer.h"

#include <cmath>

namespace lamina {
namespace {

// A row of ops: the first failure is kept and the rest are left out, so that a layer reads as its
// formula.
class Ops {
 public:
  Ops(Backend& backend, const Workspace& workspace) : backend_(backend), ws_(workspace) {}

  void Linear(const LinearArgs& a) { Run(&Backend::Linear, a); }
  void LinearInputGrad(const LinearInputGradArgs& a) { Run(&Backend::LinearInputGrad, a); }
  void LinearWeightGrad(const LinearWeightGradArgs& a) { Run(&Backend::LinearWeightGrad, a); }
  void Gelu(const GeluArgs& a) { Run(&Backend::Gelu, a); }
  void LayerNorm(const LayerNormArgs& a) { Run(&Backend::LayerNorm, a); }
  void LayerNormBackward(const LayerNormBackwardArgs& a) { Run(&Backend::LayerNormBackward, a); }
  void DropoutAddNorm(const DropoutAddNormArgs& a) { Run(&Backend::DropoutAddNorm, a); }
  void DropoutAddNormBackward(const DropoutAddNormBackwardArgs& a) {
    Run(&Backend::DropoutAddNormBackward, a);
  }
  void Attention(const AttentionArgs& a) { Run(&Backend::Attention, a); }
  void AttentionBackward(const AttentionBackwardArgs& a) { Run(&Backend::AttentionBackward, a); }

  const absl::Status& status() const { return status_; }

 private:
  template <typename Args>
  void Run(absl::Status (Backend::*op)(const Workspace&, const Args&), const Args& args) {
    if (status_.ok()) status_ = (backend_.*op)(ws_, args);
  }

  Backend& backend_;
  Workspace ws_;
  absl::Status status_;
};

float AttentionScale(const LayerDims& dims) {
  return static_cast<float>(1.0 / std::sqrt(static_cast<double>(dims.head_dim())));
}

}  // namespace

LayerActivations ScratchActivations(const LayerDims& dims, const LayerScratch& scratch) {
  LayerActivations a;
  a.attn_in = scratch.branch;
  a.qkv = TensorView{scratch.wide.data, dims.dtype, {dims.tokens(), 3 * dims.hidden}};
  a.attn_out = scratch.product;
  a.attn_sum = scratch.sum;
  a.ffn_in = scratch.branch;  // attn_in is spent by then
  a.inter = TensorView{scratch.wide.data, dims.dtype, {dims.tokens(), dims.intermediate}};
  a.ffn_sum = scratch.product;  // attn_out is spent by then
  return a;
}

LayerActivations WithScratch(const LayerActivations& kept, const LayerDims& dims,
                             const LayerScratch& scratch) {
  LayerActivations a = kept;
  if (!a.attn_in) a.attn_in = scratch.branch;
  if (!a.attn_sum) a.attn_sum = scratch.sum;
  if (!a.ffn_in) a.ffn_in = scratch.branch;  // attn_in is spent by then
  if (!a.inter)
    a.inter = TensorView{scratch.wide.data, dims.dtype, {dims.tokens(), dims.intermediate}};
  if (!a.ffn_sum) a.ffn_sum = scratch.product;
  // Means that nothing reads. Whenever a norm runs, no inter is in the wide buffer that is needed
  // any more; three columns of two bytes have room for four a row.
  const TensorView mean{scratch.wide.data, DType::kF32, {dims.tokens()}};
  if (!a.attn_mean) a.attn_mean = mean;
  if (!a.norm_mean) a.norm_mean = mean;
  return a;
}

Dropout Layer::DropoutAt(const LayerCall& call, DropoutSite site) const {
  const float ratio =
      site == DropoutSite::kAttentionProbs ? call.attn_dropout : call.hidden_dropout;
  if (ratio == 0.0f) return Dropout{};
  return Dropout{ratio, call.rng, DropoutStream(static_cast<uint32_t>(index_), site)};
}

absl::Status Layer::Forward(const LayerCall& call, const TensorView& x, const LayerActivations& s,
                            const TensorView& y, const Layer* below, const Layer* above,
                            const LayerActivations& above_saved) const {
  Ops ops(backend_, call.workspace);
  const bool pre_norm = call.pre_layer_norm;
  const bool evaluation = !s.norm_rstd;

  // n = LN(x; norm), or x itself
  if (pre_norm && below == nullptr)
    ops.LayerNorm({.x = x,
                   .gamma = w_.norm_w,
                   .beta = w_.norm_b,
                   .eps = call.eps,
                   .y = s.attn_in,
                   .mean = s.norm_mean,
                   .rstd = s.norm_rstd});
  const TensorView& n = pre_norm ? s.attn_in : x;

  // attn(n)
  ops.Linear({.x = n, .w = w_.attn_qkvw, .bias = w_.attn_qkvb, .y = s.qkv});
  ops.Attention({.dims = call.dims,
                 .qkv = s.qkv,
                 .mask = call.mask,
                 .lengths = call.lengths,
                 .cu_seqlens = call.cu_seqlens,
                 .causal = call.causal,
                 .scale = AttentionScale(call.dims),
                 .dropout = DropoutAt(call, DropoutSite::kAttentionProbs),
                 .out = s.attn_out,
                 .saved = s.attn_saved});

  // attn_sum = x + drop(attn(n) Wo + bo);  ffn_in = LN(attn_sum; attn_n).
  // Post-LN needs the sum in Backward alone.
  ops.Linear({.x = s.attn_out, .w = w_.attn_ow, .y = s.attn_sum});
  ops.DropoutAddNorm({.x = s.attn_sum,
                      .bias = w_.attn_ob,
                      .residual = x,
                      .dropout = DropoutAt(call, DropoutSite::kAttentionOutput),
                      .sum = evaluation && !pre_norm ? TensorView{} : s.attn_sum,
                      .gamma = w_.attn_nw,
                      .beta = w_.attn_nb,
                      .eps = call.eps,
                      .y = s.ffn_in,
                      .mean = s.attn_mean,
                      .rstd = s.attn_rstd});

  // inter = gelu(ffn_in Wi + bi)
  ops.Linear({.x = s.ffn_in,
              .w = w_.inter_w,
              .bias = w_.inter_b,
              .y = s.inter,
              .apply_gelu = true,
              .gelu = call.gelu,
              .pre = s.inter_pre});

  const Dropout drop = DropoutAt(call, DropoutSite::kFeedForward);
  if (pre_norm && !y) {
    // Nothing else reads y's product.
  } else if (pre_norm) {
    // y = attn_sum + drop(inter Wout + bout), summed where the product lies;  and n above
    ops.Linear({.x = s.inter, .w = w_.output_w, .y = y});
    DropoutAddNormArgs sum{
        .x = y, .bias = w_.output_b, .residual = s.attn_sum, .dropout = drop, .sum = y};
    if (above != nullptr) {
      sum.gamma = above->w_.norm_w;
      sum.beta = above->w_.norm_b;
      sum.eps = call.eps;
      sum.y = above_saved.attn_in;
      sum.mean = above_saved.norm_mean;
      sum.rstd = above_saved.norm_rstd;
    }
    ops.DropoutAddNorm(sum);
  } else {
    // ffn_sum = ffn_in + drop(inter Wout + bout);  y = LN(ffn_sum; norm)
    ops.Linear({.x = s.inter, .w = w_.output_w, .y = s.ffn_sum});
    ops.DropoutAddNorm({.x = s.ffn_sum,
                        .bias = w_.output_b,
                        .residual = s.ffn_in,
                        .dropout = drop,
                        .sum = evaluation ? TensorView{} : s.ffn_sum,
                        .gamma = w_.norm_w,
                        .beta = w_.norm_b,
                        .eps = call.eps,
                        .y = y,
                        .mean = s.norm_mean,
                        .rstd = s.norm_rstd});
  }
  return ops.status();
}

absl::Status Layer::Backward(const LayerCall& call, const TensorView& x, const LayerActivations& s,
                             const TensorView& dy, const LayerScratch& scratch,
                             const TensorView& dx, const Layer* above, const Layer* below) const {
  Ops ops(backend_, call.workspace);
  const bool pre_norm = call.pre_layer_norm;
  const TensorView dproduct = scratch.product;
  const TensorView dbranch = scratch.branch;
  // Gradients of ffn_in and attn_sum. Post-LN's branches end in the products that add to them.
  const TensorView dffn_in = pre_norm ? dbranch : scratch.sum;
  const TensorView dattn_sum = pre_norm ? scratch.sum : dx;
  const TensorView dinter{scratch.wide.data, s.inter_pre.dtype, s.inter_pre.shape};
  const TensorView dqkv{scratch.wide.data, s.qkv.dtype, s.qkv.shape};
  // What was dropped is computed again from what was kept: gelu where its gradient will lie; and of
  // a norm's input and output the one that is not there. The normalised values come from the output
  // where that was kept; else the norm's backward writes its output over the output's gradient, and
  // the weight gradient of the product that reads it comes after.
  const bool invert = !s.norm_mean;
  const TensorView again = invert ? TensorView{} : dffn_in;
  const TensorView inter = s.inter ? s.inter : dinter;

  // Through y to the output product. Pre-LN: y is the sum, and dy is also attn_sum's gradient by
  // the residual; the layer above has been here already. Post-LN: y is the norm of ffn_sum, and
  // ffn_sum's gradient is also ffn_in's.
  const Dropout ffn_drop = DropoutAt(call, DropoutSite::kFeedForward);
  if (pre_norm) {
    if (above == nullptr)
      ops.DropoutAddNormBackward(
          {.dsum = dy, .dropout = ffn_drop, .dx = dproduct, .dbias = g_.output_b});
  } else {
    ops.DropoutAddNormBackward({.dy = dy,
                                .sum = s.ffn_sum,
                                .y = invert ? s.y : TensorView{},
                                .beta = invert || above != nullptr ? w_.norm_b : TensorView{},
                                .y_again = above != nullptr ? dy : TensorView{},
                                .gamma = w_.norm_w,
                                .mean = s.norm_mean,
                                .rstd = s.norm_rstd,
                                .dropout = ffn_drop,
                                .dresidual = dffn_in,
                                .dx = dproduct,
                                .dbias = g_.output_b,
                                .dgamma = g_.norm_w,
                                .dbeta = g_.norm_b});
    if (above != nullptr) ops.LinearWeightGrad({.dy = dqkv, .x = dy, .dw = above->g_.attn_qkvw});
  }

  // Through the feed-forward branch to ffn_in.
  if (!s.inter) ops.Gelu({.x = s.inter_pre, .y = inter, .gelu = call.gelu});
  ops.LinearWeightGrad({.dy = dproduct, .x = inter, .dw = g_.output_w});
  ops.LinearInputGrad({.dy = dproduct,
                       .w = w_.output_w,
                       .dx = dinter,
                       .apply_gelu = true,
                       .gelu = call.gelu,
                       .pre = s.inter_pre,
                       .dbias = g_.inter_b});
  ops.LinearInputGrad({.dy = dinter, .w = w_.inter_w, .dx = dffn_in, .accumulate = !pre_norm});

  // Through the norm and the sum to attention's output product.
  ops.DropoutAddNormBackward({.dy = dffn_in,
                              .dsum = pre_norm ? dy : TensorView{},
                              .sum = s.attn_sum,
                              .y = invert ? s.ffn_in : TensorView{},
                              .beta = w_.attn_nb,
                              .y_again = again,
                              .gamma = w_.attn_nw,
                              .mean = s.attn_mean,
                              .rstd = s.attn_rstd,
                              .dropout = DropoutAt(call, DropoutSite::kAttentionOutput),
                              .dresidual = dattn_sum,
                              .dx = dproduct,
                              .dbias = g_.attn_ob,
                              .dgamma = g_.attn_nw,
                              .dbeta = g_.attn_nb});
  ops.LinearWeightGrad({.dy = dinter, .x = invert ? s.ffn_in : again, .dw = g_.inter_w});

  // Through attention to n.
  ops.LinearWeightGrad({.dy = dproduct, .x = s.attn_out, .dw = g_.attn_ow});
  ops.LinearInputGrad({.dy = dproduct, .w = w_.attn_ow, .dx = dbranch});
  ops.AttentionBackward({.dims = call.dims,
                         .qkv = s.qkv,
                         .mask = call.mask,
                         .lengths = call.lengths,
                         .cu_seqlens = call.cu_seqlens,
                         .causal = call.causal,
                         .scale = AttentionScale(call.dims),
                         .dropout = DropoutAt(call, DropoutSite::kAttentionProbs),
                         .out = s.attn_out,
                         .saved = s.attn_saved,
                         .dout = dbranch,
                         .dqkv = dqkv,
                         .dbias = g_.attn_qkvb});
  const TensorView dn = pre_norm ? dbranch : dx;
  ops.LinearInputGrad({.dy = dqkv, .w = w_.attn_qkvw, .dx = dn, .accumulate = !pre_norm});

  // And to x, with what came by the residual. Pre-LN goes on to the output product of the layer
  // below in the same pass. Post-LN is there; without x, the layer below makes it again.
  if (pre_norm && below != nullptr) {
    ops.DropoutAddNormBackward({.dy = dn,
                                .dsum = dattn_sum,
                                .sum = invert ? TensorView{} : x,
                                .y = invert ? s.attn_in : TensorView{},
                                .beta = w_.norm_b,
                                .y_again = again,
                                .gamma = w_.norm_w,
                                .mean = s.norm_mean,
                                .rstd = s.norm_rstd,
                                .dropout = below->DropoutAt(call, DropoutSite::kFeedForward),
                                .dresidual = dx,
                                .dx = dproduct,
                                .dbias = below->g_.output_b,
                                .dgamma = g_.norm_w,
                                .dbeta = g_.norm_b});
  } else if (pre_norm) {
    ops.LayerNormBackward({.dy = dn,
                           .x = invert ? TensorView{} : x,
                           .y = invert ? s.attn_in : TensorView{},
                           .beta = w_.norm_b,
                           .y_again = again,
                           .gamma = w_.norm_w,
                           .mean = s.norm_mean,
                           .rstd = s.norm_rstd,
                           .residual_grad = dattn_sum,
                           .dx = dx,
                           .dgamma = g_.norm_w,
                           .dbeta = g_.norm_b});
  }
  if (pre_norm) {
    ops.LinearWeightGrad({.dy = dqkv, .x = invert ? s.attn_in : again, .dw = g_.attn_qkvw});
  } else if (x) {
    ops.LinearWeightGrad({.dy = dqkv, .x = x, .dw = g_.attn_qkvw});
  }
  return ops.status();
}

}  // namespace lamina
