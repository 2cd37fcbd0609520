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
  bool normalize_invertible = false;
  bool gelu_checkpoint = false;
  bool attn_dropout_checkpoint = false;
  bool stochastic_mode = false;
  bool adjust_init_range = true;  // the two output matrices' deviation is range / sqrt(2L)
  bool training = true;           // false: no gradients, optimizer state or contexts are kept
  GeluKind gelu = GeluKind::kErf;
  int64_t max_contexts = 2;  // activation contexts at full batch_size x max_seq_length, 1..1024

  // Largest values that are accepted; the plan decides what fits.
  static constexpr int64_t kMaxSeqLength = 8192;
  static constexpr int64_t kMaxBatchSize = 65536;
  static constexpr int64_t kMaxHiddenSize = 65536;
  static constexpr int64_t kMaxIntermediateSize = 262144;
  static constexpr int64_t kMaxLayers = 1024;

  int64_t head_dim() const { return hidden_size / heads; }
  // Dimensions of a call of `batch` sequences of `seq` tokens.
  LayerDims Dims(int64_t batch, int64_t seq) const;
};

// Checks every field and fills in intermediate_size, dtype from fp16, and seed. INVALID_ARGUMENT
// names the field, its value and its range; NaN ratios are refused. UNIMPLEMENTED for a memory flag
// or stochastic_mode that this version lacks. `device_ordinal` is what local_rank is compared with.
absl::StatusOr<StackConfig> Resolve(StackConfig config, int device_ordinal);

// OK for a ratio in [0, 1) that is still below 1 as fp32; else INVALID_ARGUMENT naming the field.
absl::Status CheckDropoutRatio(const char* name, double ratio);

// The config as a JSON object with the field names above, and back; a checkpoint's header carries
// it. Unknown keys are an INVALID_ARGUMENT, missing ones take their defaults.
std::string ToJson(const StackConfig& config);
absl::StatusOr<StackConfig> StackConfigFromJson(const std::string& json);

}  // namespace lamina
