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

// Lays buffers one after the other, each at a multiple of kArenaAlignment from `base`.
class Placer {
 public:
  // base null: only sums. entries null: keeps no record of names.
  explicit Placer(void* base, std::vector<PlanEntry>* entries = nullptr)
      : base_(static_cast<char*>(base)), entries_(entries) {}

  TensorView Place(MemoryKind kind, absl::string_view name, DType dtype, const Shape& shape);
  // `count` values of trivial type T.
  template <typename T>
  T* Place(MemoryKind kind, absl::string_view name, int64_t count) {
    return static_cast<T*>(PlaceBytes(kind, name, static_cast<size_t>(count) * sizeof(T)));
  }
  void* PlaceBytes(MemoryKind kind, absl::string_view name, size_t bytes);

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

// --- scratch: as long as the stack lives ---
struct WorkspaceBuffers {
  Workspace ops;
  LayerScratch scratch;   // for the largest call; cut down by CutScratch
  TensorView chain;       // act [T, H]: a layer's output or input gradient on its way to the next
  TensorView staging[4];  // uint8, by Stack::Staging; absent where kernels read host memory
};
WorkspaceBuffers PlaceWorkspace(Placer& placer, const StackConfig& config, const Backend& backend);
// The same scratch for a call of smaller dims.
LayerScratch CutScratch(const LayerScratch& scratch, const LayerDims& dims);

// --- what training adds: freed when training is turned off ---
struct TrainingBuffers {
  TensorView gradients;  // fp32 [elements]
  TensorView m, v;       // fp32 [elements]
  OptimizerControl* control = nullptr;
  TensorView chain;  // act [T, H]: Backward alternates between this one and the workspace's
};
TrainingBuffers PlaceTraining(Placer& placer, const StackConfig& config,
                              const ParameterLayout& parameters);

// --- one activation context ---
struct ContextBuffers {
  RngState* rng = nullptr;
  TensorView mask;     // fp32 [B, S]: room for it, used or not
  TensorView lengths;  // int32 [B]
  TensorView input;    // act [T, H]: copy of the first layer's input
  struct SavedLayer {
    LayerActivations activations;
    TensorView output;  // act [T, H]: the next layer's input; absent for the last layer
  };
  std::vector<SavedLayer> layers;
};
ContextBuffers PlaceContext(Placer& placer, const StackConfig& config, const Backend& backend,
                            int64_t layers, int64_t batch, int64_t seq);

}  // namespace lamina
