// One encoder layer and its gradient, composed of the oracle's ops in double precision.
//
//   Pre-LN:   n = LN(x; norm);              a = x + drop(attn(n) Wo + bo)
//             y = a + drop(ffn(LN(a; attn_norm)))
//   Post-LN:  a = LN(x + drop(attn(x) Wo + bo); attn_norm)
//             y = LN(a + drop(ffn(a)); norm)
//   ffn(z) = gelu(z Wi + bi) Wout + bout
//
// The order and the parameters are those of DeepSpeed's transformer kernel.
#pragma once

#include <cstdint>

#include "ref/ops.h"

namespace lamina::ref {

// Of a packed batch, `batch` is the number of sequences and `seq` the longest one's length.
struct LayerConfig {
  int64_t batch = 0, seq = 0, hidden = 0, heads = 0, intermediate = 0;
  bool pre_layer_norm = true;
  double eps = 1e-12;
  GeluKind gelu = GeluKind::kErf;
  float attn_dropout_ratio = 0.0f;    // on the attention probabilities
  float hidden_dropout_ratio = 0.0f;  // on the two sub-layer outputs
  RngState rng{};
  uint32_t layer_index = 0;  // whose masks
};

// Weights are [out, in], as LinearArgs has them. Also the gradients' type.
struct LayerParameters {
  Vec qkv_w, qkv_b;              // [3H, H], [3H]: Q, K, V stacked
  Vec o_w, o_b;                  // [H, H], [H]
  Vec attn_norm_w, attn_norm_b;  // [H]
  Vec inter_w, inter_b;          // [I, H], [I]
  Vec output_w, output_b;        // [H, I], [H]
  Vec norm_w, norm_b;            // [H]
};

// Every intermediate value, by its name in the formulas above.
struct LayerValues {
  Vec x;                 // [T, H]: the input
  NormResult norm;       // Pre-LN: LN(x). Post-LN: the last norm, whose y is the output
  Vec n;                 // [T, H]: what goes into the QKV product
  Vec qkv;               // [T, 3H]
  Vec attention;         // [T, H]: before the output product
  Vec attn_sum;          // [T, H]: x + drop(...)
  NormResult attn_norm;  // of attn_sum
  Vec inter_pre;         // [T, I]: before gelu
  Vec inter;             // [T, I]
  Vec output_sum;        // [T, H]: a + drop(...), which is y in Pre-LN
  Vec y;                 // [T, H]
};

LayerValues LayerForward(const LayerConfig& config, const LayerParameters& p, const Vec& x,
                         const Keys& keys);

struct LayerGradients {
  Vec dx;  // [T, H]
  LayerParameters parameters;
};
// For dy [T, H]; `values` and `keys` are Forward's.
LayerGradients LayerBackward(const LayerConfig& config, const LayerParameters& p,
                             const LayerValues& values, const Keys& keys, const Vec& dy);

}  // namespace lamina::ref
