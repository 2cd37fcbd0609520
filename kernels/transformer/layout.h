// Where every buffer of a stack lies. One Place* function a memory arena names each buffer once;
// run over no memory it sums the plan, run over an arena it hands out the views. So the plan and
// the allocation can't differ.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "lamina/kernels/backend.h"
#include "lamina/transformer/config.h"
#include "lamina/transformer/plan.h"
#include "layer.h"
#include "parameters.h"

namespace lamina {

inline constexpr size_t kArenaAlignment = 256;

// A buffer's name in the plan: "gradients", or a part of an owner, as "layer.qkv". Joined only
// where names are recorded.
struct BufferName {
  BufferName(const char* whole) : part(whole) {}  // NOLINT(google-explicit-constructor)
  BufferName(absl::string_view owner_name, absl::string_view part_name)
      : owner(owner_name), part(part_name) {}
  absl::string_view owner;  // empty: none
  absl::string_view part;
};

// Lays buffers one after the other, each at a multiple of kArenaAlignment from `base`.
class Placer {
 public:
  // base null: only sums. entries null: keeps no record of names.
  explicit Placer(void* base, std::vector<PlanEntry>* entries = nullptr)
      : base_(static_cast<char*>(base)), entries_(entries) {}

  TensorView Place(MemoryKind kind, const BufferName& name, DType dtype, const Shape& shape);
  // `count` values of trivial type T.
  template <typename T>
  T* Place(MemoryKind kind, const BufferName& name, int64_t count) {
    return static_cast<T*>(PlaceBytes(kind, name, static_cast<size_t>(count) * sizeof(T)));
  }
  void* PlaceBytes(MemoryKind kind, const BufferName& name, size_t bytes);

  // So far; SIZE_MAX once anything overflowed 63 bits.
  size_t bytes() const { return bytes_; }

 private:
  char* base_;
  std::vector<PlanEntry>* entries_;
  size_t bytes_ = 0;
};

// a + b and a * b, SIZE_MAX where the result or an operand does not fit 63 bits.
size_t SaturatingAdd(size_t a, size_t b);
size_t SaturatingMultiply(size_t a, size_t b);

// --- the weights: as long as the stack lives ---
struct WeightBuffers {
  TensorView weights;  // act [elements]
  TensorView master;   // fp32 [elements]; the same memory as weights where dtype is fp32
};
WeightBuffers PlaceWeights(Placer& placer, const StackConfig& config,
                           const ParameterLayout& parameters);

// --- calls ---

// The largest calls that `config` allows. A packed batch has at most a sequence a token.
LayerDims LargestDenseCall(const StackConfig& config);
LayerDims LargestPackedCall(const StackConfig& config);

// --- scratch: as long as the stack lives ---
struct WorkspaceBuffers {
  Workspace ops;
  PendingSums pending;
  LayerScratch scratch;   // for the largest call; cut down by CutScratch
  TensorView chain;       // act [T, H]: a layer's output or input gradient on its way to the next
  TensorView staging[7];  // uint8, by Stack::Staging; absent where kernels read host memory
};
WorkspaceBuffers PlaceWorkspace(Placer& placer, const StackConfig& config, const OpSizes& sizes);
// The same scratch for a call of smaller dims.
LayerScratch CutScratch(const LayerScratch& scratch, const LayerDims& dims);

// --- what training adds: freed when training is turned off ---
struct TrainingBuffers {
  TensorView gradients;  // fp32 [elements]
  TensorView m, v;       // fp32 [elements]
  OptimizerControl* control = nullptr;
  LambSegment* segments = nullptr;  // one a parameter
  TensorView chain;  // act [T, H]: Backward alternates between this one and the workspace's
};
TrainingBuffers PlaceTraining(Placer& placer, const StackConfig& config,
                              const ParameterLayout& parameters);

// --- activations: laid out anew when a memory flag changes ---

// What a layer keeps, or, as `owner` "recompute", what Backward computes again under
// activation_checkpointing; without what the memory flags drop. `attn_saved_bytes` is
// AttentionSavedBytes of the call.
LayerActivations PlaceActivations(Placer& placer, MemoryKind kind, absl::string_view owner,
                                  const StackConfig& config, const LayerDims& dims,
                                  size_t attn_saved_bytes);

// One set of activations that every layer's recomputation overwrites, for the largest call. Places
// nothing without activation_checkpointing.
void PlaceLargestRecompute(Placer& placer, const StackConfig& config, const OpSizes& sizes);

// One activation context.
struct ContextBuffers {
  RngState* rng = nullptr;
  // Which keys are seen: fp32 mask [B, S], int32 lengths [B] or int32 cumulative lengths [n + 1].
  // A call has one of them at most, and a packed one at most as many sequences as tokens: T + 1
  // values of four bytes hold any.
  void* keys = nullptr;
  // act [T, H]: copy of the first layer's input. Absent where no Backward reads it: Pre-LN with
  // its norms inverted.
  TensorView input;
  struct SavedLayer {
    LayerActivations activations;  // all absent with activation_checkpointing
    // act [T, H]: the layer's output. Absent where Backward does not read the next layer's input
    // (Pre-LN with its norms inverted) or makes it again (Post-LN without); the last layer's is
    // there only where its norm is inverted from it.
    TensorView output;
  };
  std::vector<SavedLayer> layers;
};
ContextBuffers PlaceContext(Placer& placer, const StackConfig& config, int64_t layers,
                            const LayerDims& dims, size_t attn_saved_bytes);
// A context that any call of all layers fits into.
ContextBuffers PlaceLargestContext(Placer& placer, const StackConfig& config, const OpSizes& sizes);

}  // namespace lamina
