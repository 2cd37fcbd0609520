// One transformer encoder layer, forward and backward, over the op set. The formulas are in
// stack.h. Only enqueues; owns nothing; the caller has checked every shape.
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "lamina/kernels/backend.h"
#include "parameters.h"

namespace lamina {

// What all layers of one call share.
struct LayerCall {
  LayerDims dims;
  bool pre_layer_norm = true;
  GeluKind gelu = GeluKind::kErf;
  float eps = 1e-12f;
  float attn_dropout = 0.0f;      // p in [0, 1); 0 in evaluation
  float hidden_dropout = 0.0f;    // p in [0, 1); 0 in evaluation
  const RngState* rng = nullptr;  // in the backend's memory; null in evaluation
  bool causal = false;
  TensorView mask;        // fp32 [B, S]; absent: none
  TensorView lengths;     // int32 [B]; absent: none
  TensorView cu_seqlens;  // int32 [B + 1]; present exactly where packed
  Workspace workspace;
};

// What a layer's Forward leaves for its Backward, besides its input. In evaluation the views marked
// (t) are absent and the rest point into scratch, some of them at the same bytes
// (ScratchActivations).
//
// Memory flags drop views: (g) under gelu_checkpoint, (n) under normalize_invertible, and (m) in
// its absence: a norm keeps its input or its output. Forward needs them all the same, in scratch
// (WithScratch); Backward takes an absent one as dropped.
struct LayerActivations {
  TensorView attn_in;     // (m) act [T, H]: LN(x), the QKV product's input. Pre-LN; Post-LN takes x
  TensorView qkv;         // act [T, 3H]
  TensorView attn_saved;  // (t) uint8, opaque
  TensorView attn_out;    // act [T, H]: attention, before its output product
  TensorView attn_sum;    // (n) act [T, H]: x + drop(...): Pre-LN's a, Post-LN's norm input
  TensorView attn_mean, attn_rstd;  // (t), the mean (n): fp32 [T], of attn_sum
  TensorView ffn_in;     // (m) act [T, H]: LN(attn_sum), the first feed-forward product's input
  TensorView inter_pre;  // (t) act [T, I]: before gelu
  TensorView inter;      // (g) act [T, I]: after gelu
  TensorView ffn_sum;    // (n) act [T, H]: a + drop(...), the last norm's input. Post-LN only
  TensorView norm_mean, norm_rstd;  // (t), the mean (n): fp32 [T], of x (Pre-LN) or ffn_sum
  TensorView y;  // act [T, H]: the layer's output. For Backward without ffn_sum in Post-LN only
};

// Overwritten by every layer.
struct LayerScratch {
  TensorView wide;     // act [T, max(3H, I)]: gradient of inter, then of qkv
  TensorView product;  // act [T, H]: gradient of an output product, before its bias
  TensorView branch;   // act [T, H]: gradient of a branch's input or attention's output
  TensorView sum;      // act [T, H]: gradient of a residual sum. A norm's backward may make its
                       // output again over its gradient, in this one or in branch
};

// Where evaluation keeps a layer's activations: in the scratch that Backward would use.
LayerActivations ScratchActivations(const LayerDims& dims, const LayerScratch& scratch);

// `kept` with every view that a training Forward needs and a memory flag dropped, in scratch.
LayerActivations WithScratch(const LayerActivations& kept, const LayerDims& dims,
                             const LayerScratch& scratch);

class Layer {
 public:
  // `index` names the layer in the dropout streams. `weights` are act; `gradients` fp32, absent
  // views where training is off. The views' memory must outlive the layer.
  Layer(Backend& backend, int64_t index, const LayerTensors& weights, const LayerTensors& gradients)
      : backend_(backend), index_(index), w_(weights), g_(gradients) {}

  // x, y: act [T, H], not overlapping. Fills `saved`. y absent, in Pre-LN alone: what only y needs
  // is left out, as Backward does not.
  //
  // `above`: the layer that goes on from y in the same call, if any. Its Forward must come next,
  // with this one as `below`, and `above_saved` be its `saved`: in Pre-LN its first norm is taken
  // in the pass that sums y.
  absl::Status Forward(const LayerCall& call, const TensorView& x, const LayerActivations& saved,
                       const TensorView& y, const Layer* below, const Layer* above,
                       const LayerActivations& above_saved) const;

  // x and saved are Forward's. dy, dx: act [T, H], not overlapping; dx is overwritten. Adds to the
  // gradients of the parameters.
  //
  // `below`, or null: the layer of the same call whose Backward must come next, with what is left
  // in `scratch` and with this one as `above`, in Post-LN only where x is absent. What they do for
  // each other:
  // Pre-LN: this one goes on to the gradient of the product that `below` ends with, in one pass,
  //   and adds to the gradient of its output_b.
  // Post-LN without x: `below` makes x again, over its dy, and adds to the gradient of this one's
  //   attn_qkvw first.
  // Without `below` x may be absent only in Pre-LN without norm_mean.
  absl::Status Backward(const LayerCall& call, const TensorView& x, const LayerActivations& saved,
                        const TensorView& dy, const LayerScratch& scratch, const TensorView& dx,
                        const Layer* above, const Layer* below) const;

 private:
  Dropout DropoutAt(const LayerCall& call, DropoutSite site) const;

  Backend& backend_;
  int64_t index_;
  LayerTensors w_;
  LayerTensors g_;
};

}  // namespace lamina
