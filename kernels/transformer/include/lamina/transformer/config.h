// What a stack is: the settings of DeepSpeed's transformer layer under their own names, and ours.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "lamina/kernels/backend.h"

namespace lamina {

// A plain value. Resolve() turns what a user gave into what a Stack runs with.
struct StackConfig {
  int64_t batch_size = 0;             // largest B of a call, >= 1
  int64_t max_seq_length = 0;         // largest S of a call, 1..kMaxSeqLength
  int64_t hidden_size = 0;            // H, divisible by heads
  int64_t intermediate_size = -1;     // I; -1: 4 * hidden_size
  int64_t heads = 0;                  // A
  int64_t num_hidden_layers = 0;      // L
  double attn_dropout_ratio = 0.0;    // p in [0, 1)
  double hidden_dropout_ratio = 0.0;  // p in [0, 1)
  double initializer_range = 0.02;    // standard deviation of the initial weights, >= 0
  double layer_norm_eps = 1e-12;      // > 0
  int local_rank = -1;                // device ordinal that the stack must be on; -1: the daemon's
  int64_t seed = -1;                  // >= 0; -1: Resolve draws one and stores it here
  bool fp16 = false;                  // DeepSpeed's name for dtype = fp16
  DType dtype = DType::kF32;          // weights and activations: fp32, bf16, fp16
  bool pre_layer_norm = true;
  // Memory flags: less is kept for Backward, which computes it again. Any combination.
  bool normalize_invertible = false;      // not the norms' inputs: x^ = (y - beta) / gamma
  bool gelu_checkpoint = false;           // not the GELU's output
  bool attn_dropout_checkpoint = false;   // no effect: fused attention keeps nothing of it anyway
  bool activation_checkpointing = false;  // nothing but each layer's input
  bool stochastic_mode =
      false;  // sums over tokens may be added in any order (Workspace::unordered)
  bool adjust_init_range = true;  // the two output matrices' deviation is range / sqrt(2L)
  bool training = true;           // false: no gradients, optimizer state or contexts are kept
  bool causal = false;            // token s attends to tokens 0..s alone
  GeluKind gelu = GeluKind::kErf;
  // Dynamic loss scaling (Micikevicius et al., "Mixed Precision Training", 2018): the daemon tells
  // the scale, the client multiplies its loss by it, ApplyGradients divides and adjusts it.
  bool dynamic_loss_scale = false;
  double initial_loss_scale = 65536.0;        // a power of two in [min_loss_scale, 2^24]
  int64_t loss_scale_growth_interval = 1000;  // clean steps before the scale doubles, >= 1
  double loss_scale_growth_factor = 2.0;      // > 1
  double loss_scale_backoff_factor = 0.5;     // in (0, 1)
  int64_t loss_scale_hysteresis = 2;  // overflows until it backs off, >= 1; each growth renews them
  double min_loss_scale = 1.0;        // > 0
  int64_t max_contexts = 2;  // activation contexts at full batch_size x max_seq_length, 1..1024

  // Largest values that are accepted; the plan decides what fits.
  static constexpr int64_t kMaxSeqLength = 8192;
  static constexpr int64_t kMaxBatchSize = 65536;
  static constexpr int64_t kMaxHiddenSize = 65536;
  static constexpr int64_t kMaxIntermediateSize = 262144;
  static constexpr int64_t kMaxLayers = 1024;
  static constexpr double kMaxLossScale = 0x1p24;  // growth ends here

  int64_t head_dim() const { return hidden_size / heads; }
  // Whether Backward reads the norms' values back from their outputs. A Pre-LN layer that is
  // computed again has its input anyway, and one tensor less to keep without.
  bool inverts_norms() const {
    return normalize_invertible && !(activation_checkpointing && pre_layer_norm);
  }
  // Dimensions of a call of `batch` sequences of `seq` tokens; packed: `packed_tokens` in all, and
  // `seq` the longest one's length.
  LayerDims Dims(int64_t batch, int64_t seq, int64_t packed_tokens = 0) const;
};

// Checks every field and fills in intermediate_size, dtype from fp16, and seed. INVALID_ARGUMENT
// names the field, its value and its range; NaN ratios are refused. `device_ordinal` is what
// local_rank is compared with.
absl::StatusOr<StackConfig> Resolve(StackConfig config, int device_ordinal);

// OK for a ratio in [0, 1) that is still below 1 as fp32; else INVALID_ARGUMENT naming the field.
absl::Status CheckDropoutRatio(const char* name, double ratio);

// The config as a JSON object with the field names above, and back; a checkpoint's header carries
// it. Unknown keys are an INVALID_ARGUMENT, missing ones take their defaults.
std::string ToJson(const StackConfig& config);
absl::StatusOr<StackConfig> StackConfigFromJson(const std::string& json);

}  // namespace lamina
